/**
 * The server's HTTP API: JSON and streams of events, both by `fetch`, so that every call can carry
 * the same header fields. Addresses are relative to the page, whatever proxy stands before it.
 */

import { token } from "./token.js";

/** What the server said, or that it could not be reached; `message` is one line for people. */
export class ApiError extends Error {
  /**
   * @param {number} status  0: no answer came.
   * @param {string} code  The server's reason, such as GENERATION_MISMATCH.
   * @param {string} message
   */
  constructor(status, code, message) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/**
 * @typedef {object} Options
 * @property {number} [ifMatch]  The generation that a change was decided on.
 * @property {AbortSignal} [signal]  Ends the call, which then throws an AbortError.
 */

/**
 * Return what the server answers.
 * @param {string} method
 * @param {string} path  Without a slash before it.
 * @param {unknown} [body]  Sent as JSON.
 * @param {Options} [options]
 * @returns {Promise<any>}
 * @throws {ApiError}
 */
export async function ask(method, path, body, options = {}) {
  const answer = await send(method, path, body, options);
  try {
    return await answer.json();
  } catch (error) {
    throw asApiError(error);
  }
}

/**
 * Yield the data of each event of a stream; the stream ends when the loop over it is left.
 * @param {string} method
 * @param {string} path
 * @param {unknown} [body]
 * @param {Options} [options]
 * @returns {AsyncGenerator<any, void, void>}
 * @throws {ApiError}  Refused, broken off, or ended by the server with an error.
 */
export async function* events(method, path, body, options = {}) {
  const answer = await send(method, path, body, options);
  if (answer.body === null) return;
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    let text = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const parts = (text + value).split("\n\n");
      text = /** @type {string} */ (parts.pop());
      for (const part of parts) {
        const data = dataOf(part);
        if (data === "") continue; // A comment, with which proxies keep a connection.
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw new ApiError(answer.status, event.error.code, event.error.message);
        yield event;
      }
    }
  } catch (error) {
    throw asApiError(error);
  } finally {
    reader.cancel().catch(() => {}); // The server sees that nobody reads, and lets its row go.
  }
}

/** @param {string} event @returns {string} */
function dataOf(event) {
  const lines = event.split("\n").filter((line) => line.startsWith("data:"));
  return lines.map((line) => line.slice(5).trimStart()).join("\n");
}

/**
 * @param {string} method
 * @param {string} path
 * @param {unknown} body
 * @param {Options} options
 */
async function send(method, path, body, { ifMatch, signal }) {
  /** @type {Record<string, string>} */
  const headers = {};
  if (token() !== "") headers["Authorization"] = `Bearer ${token()}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  if (ifMatch !== undefined) headers["If-Match"] = `"${ifMatch}"`;
  let answer;
  try {
    const sent = body === undefined ? undefined : JSON.stringify(body);
    answer = await fetch(path, { method, headers, body: sent, signal, cache: "no-store" });
  } catch (error) {
    throw asApiError(error);
  }
  if (!answer.ok) throw await refusal(answer);
  return answer;
}

/** @param {Response} answer @returns {Promise<ApiError>} */
async function refusal(answer) {
  try {
    const { error } = await answer.json();
    return new ApiError(answer.status, error.code, error.message);
  } catch {
    return new ApiError(answer.status, "", `the server answered with status ${answer.status}`);
  }
}

/** @param {unknown} error @returns {unknown} */
function asApiError(error) {
  // Of fetch and of a stream that broke off; an AbortError is the caller's own doing.
  if (error instanceof TypeError) return new ApiError(0, "", "the server cannot be reached");
  return error;
}
