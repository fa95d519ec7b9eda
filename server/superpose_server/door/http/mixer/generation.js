/** A text as the server writes it: the request for it, and what has come of it so far. */

import { events } from "./api.js";
import { mixToJson } from "./mix.js";

/**
 * @typedef {import("./state.js").Prompt} Prompt
 * @typedef {import("./mix.js").Mix} Mix
 *
 * @typedef {object} Written
 * @property {string} text
 * @property {number} tokens
 * @property {number | null} tokensPerSecond  From the first token to the last; null of fewer than two.
 * @property {string | null} finish  stop, length or abort; null while it goes on.
 */

/**
 * Return path and body of the request for a text.
 * @param {Prompt} prompt @param {Mix} mix
 * @returns {{path: string, body: Record<string, unknown>}}
 */
export function textRequest(prompt, mix) {
  const { text, chat, maxTokens, temperature, seed } = prompt;
  return {
    path: chat ? "v1/chat/completions" : "v1/completions",
    body: {
      mix: mixToJson(mix),
      ...(chat ? { messages: [{ role: "user", content: text }] } : { prompt: text }),
      max_tokens: maxTokens,
      temperature,
      seed,
    },
  };
}

/**
 * Yield a text as it grows.
 * @param {Prompt} prompt @param {Mix} mix @param {AbortSignal} signal
 * @returns {AsyncGenerator<Written, void, void>}
 */
export async function* write(prompt, mix, signal) {
  const { path, body } = textRequest(prompt, mix);
  const streaming = {
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
  };
  /** @type {Written} */
  let written = { text: "", tokens: 0, tokensPerSecond: null, finish: null };
  /** @type {{time: number, tokens: number} | null} */
  let first = null;
  for await (const event of events("POST", path, { ...body, ...streaming }, { signal })) {
    const [choice] = event.choices;
    const tokens = event.usage?.completion_tokens ?? written.tokens;
    const time = performance.now();
    if (first === null && tokens > 0) first = { time, tokens };
    written = {
      text: written.text + (choice?.text ?? choice?.delta.content ?? ""),
      tokens,
      tokensPerSecond:
        first !== null && tokens > Math.max(first.tokens, written.tokens)
          ? ((tokens - first.tokens) * 1000) / (time - first.time)
          : written.tokensPerSecond,
      finish: choice?.finish_reason ?? written.finish,
    };
    yield written;
  }
}
