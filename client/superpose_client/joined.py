"""Texts that came in chunks, made whole."""

from collections.abc import Sequence

from superpose_client.results import Generation, GenerationChunk


def joined(chunks: Sequence[Generation | GenerationChunk]) -> GenerationChunk:
    """Return consecutive chunks, at least one, as one."""
    last = chunks[-1]
    return GenerationChunk(
        text="".join(chunk.text for chunk in chunks),
        token_ids=tuple(token for chunk in chunks for token in chunk.token_ids),
        logprobs=tuple(logprob for chunk in chunks for logprob in chunk.logprobs),
        finish_reason=last.finish_reason,
        usage=last.usage,
        mix=last.mix,
        request_id=last.request_id,
        top_logprobs=tuple(top for chunk in chunks for top in chunk.top_logprobs),
    )
