/** What mixes are measured on, pasted or from files: one sample, which curve and fit share. */

import { NumberField } from "./number_field.js";
import { Problem } from "./panel.js";
import { readRows } from "./rows.js";
import { createStore, useStore } from "./store.js";
import { html, useMemo, useState } from "./vendor/htm-preact.js";

/**
 * @typedef {import("./rows.js").Item} Item
 * @typedef {object} Source  Rows that are told apart from others.
 * @property {string} name  Of a file; "pasted".
 * @property {Item[]} items
 *
 * @typedef {object} Sample
 * @property {string} pasted
 * @property {readonly Source[]} files
 * @property {"all" | "answer"} scope  Which tokens count.
 * @property {string} maxLength  Tokens kept of each row, as it is typed; "": as many as fit.
 */

const MOST_BYTES = 8 << 20; // of a file; a request may have no more

/** @type {import("./store.js").Store<Sample>} */
export const sample = createStore({
  pasted: "",
  files: /** @type {readonly Source[]} */ ([]),
  scope: /** @type {"all" | "answer"} */ ("all"),
  maxLength: "",
});

/**
 * Return where the rows come from, and one line that says why what is pasted cannot be read.
 * @returns {{sources: Source[], problem: string}}
 */
export function useSources() {
  const pasted = useStore(sample, (state) => state.pasted);
  const files = useStore(sample, (state) => state.files);
  return useMemo(() => {
    try {
      const items = readRows(pasted);
      return { sources: [...(items.length ? [{ name: "pasted", items }] : []), ...files], problem: "" };
    } catch (error) {
      return { sources: [...files], problem: `Pasted: ${/** @type {Error} */ (error).message}.` };
    }
  }, [pasted, files]);
}

/**
 * Return the fields of a request that say what is measured: the first rows, if there are more than
 * `most`, as many of each source as of the others.
 * @param {readonly Source[]} sources @param {number} most
 * @returns {{items: Item[], sourceOf: string[], scope: string, max_length?: number}}  `sourceOf`:
 *     the name of each item's source.
 */
export function measured(sources, most) {
  const { scope, maxLength } = sample.get();
  /** @type {{item: Item, name: string, place: number}[]} */
  const rows = sources.flatMap(({ name, items }) => items.map((item, place) => ({ item, name, place })));
  // A stable sort: the first rows of all sources come before the second ones.
  const taken = rows.length > most ? [...rows].sort((a, b) => a.place - b.place).slice(0, most) : rows;
  return {
    items: taken.map(({ item }) => item),
    sourceOf: taken.map(({ name }) => name),
    scope,
    ...(maxLength === "" ? {} : { max_length: Number(maxLength) }),
  };
}

/** @param {readonly Source[]} sources */
export const countRows = (sources) => sources.reduce((sum, { items }) => sum + items.length, 0);

/**
 * The place where rows are pasted, dropped and chosen.
 * @param {{id: string, sources: readonly Source[], problem: string, most: number}} props  `id`: of
 *     the section. `most`: rows that it can use.
 */
export function SampleInput({ id, sources, problem, most }) {
  const { pasted, files, scope, maxLength } = useStore(sample, (state) => state);
  const [refused, setRefused] = useState(/** @type {string[]} */ ([]));
  const [over, setOver] = useState(false);
  const add = async (/** @type {File[]} */ chosen) => {
    const read = await Promise.all(chosen.map(readFile));
    setRefused(read.flatMap((each) => (typeof each === "string" ? [each] : [])));
    const added = /** @type {Source[]} */ (read.filter((each) => typeof each !== "string"));
    const names = new Set(added.map(({ name }) => name));
    sample.set({ files: [...sample.get().files.filter(({ name }) => !names.has(name)), ...added] });
  };
  const rows = countRows(sources);
  const answers = rows > 0 && sources.every(({ items }) => items.every((item) => "question_answer" in item));
  return html`
    <div class="sample ${over ? "over" : ""}"
      onDragOver=${(/** @type {DragEvent} */ event) => (event.preventDefault(), setOver(true))}
      onDragLeave=${() => setOver(false)}
      onDrop=${(/** @type {DragEvent} */ event) => {
        event.preventDefault();
        setOver(false);
        add([...(event.dataTransfer?.files ?? [])]);
      }}>
      <label for="${id}-pasted">Measured on</label>
      <textarea id="${id}-pasted" rows="3" spellcheck=${false} value=${pasted}
        placeholder=${'A text a line, or {"question": …, "answer": …} a line. Files may be dropped here.'}
        onInput=${(/** @type {any} */ event) => sample.set({ pasted: event.currentTarget.value })}></textarea>
      <div class="options">
        <label class="choose">
          Choose files
          <input class="visually-hidden" type="file" multiple accept=".jsonl,.json,.txt,.text,text/plain"
            onChange=${(/** @type {any} */ event) => {
              add([...event.currentTarget.files]);
              event.currentTarget.value = ""; // So that the same file can be chosen again.
            }} />
        </label>
        <label class="field">
          Tokens that count
          <select value=${scope} onChange=${(/** @type {any} */ event) => sample.set({ scope: event.currentTarget.value })}>
            <option value="all">all</option>
            <option value="answer" disabled=${!answers}>of the answers</option>
          </select>
        </label>
        <${NumberField} name="Tokens kept of a row" placeholder="all that fit" min=${2} step=${1} value=${maxLength}
          onValue=${(/** @type {string} */ maxLength) => sample.set({ maxLength })} />
      </div>
      ${files.length > 0 &&
      html`<ul class="sources">
        ${files.map(
          ({ name, items }) => html`
            <li key=${name}>
              ${name} <span class="hint">${counted(items.length)}</span>
              <button type="button" class="quiet" aria-label="Leave out ${name}"
                onClick=${() => sample.set({ files: files.filter((/** @type {Source} */ file) => file.name !== name) })}>×</button>
            </li>
          `,
        )}
      </ul>`}
      ${rows > 0 && html`<p class="hint">
        ${counted(rows)}${rows > most && `, of which the first ${most} are used, as many of each file as of the others`}
      </p>`}
      ${scope === "answer" && !answers && rows > 0 &&
      html`<${Problem}>Not all rows have an answer: let all tokens count.<//>`}
      ${problem && html`<${Problem}>${problem}<//>`}
      ${refused.map((line) => html`<${Problem} key=${line}>${line}<//>`)}
    </div>
  `;
}

/** @param {number} rows */
const counted = (rows) => `${rows} ${rows === 1 ? "row" : "rows"}`;

/** @param {File} file @returns {Promise<Source | string>} One line if it cannot be read. */
async function readFile(file) {
  const { name } = file;
  if (/\.(csv|tsv)$/i.test(name)) return `${name}: tables are not read; make it JSON, an object a line.`;
  if (file.size > MOST_BYTES) return `${name}: larger than a request may be, ${MOST_BYTES >> 20} MiB.`;
  try {
    const isJson = /\.jsonl?$/i.test(name);
    const items = readRows(new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer()), isJson);
    return items.length ? { name, items } : `${name} holds no text.`;
  } catch (error) {
    const undecodable = error instanceof TypeError;
    return `${name}: ${undecodable ? "not a text in UTF-8" : /** @type {Error} */ (error).message}.`;
  }
}
