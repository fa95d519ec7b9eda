/**
 * The default mixes that this page has watched, and where among them the server stands now.
 *
 * Undo and redo ask the server for a mix of this list. That the server got there is known from what
 * it tells afterwards, like any change: `moving` is where the page has asked it to go.
 *
 * @typedef {import("./mix.js").Mix} Mix
 * @typedef {{generation: number, digest: string, mix: Mix}} State  A default mix.
 * @typedef {{states: readonly State[], position: number, moving: number | null}} History
 */

import { sameMix } from "./mix.js";

/** @type {History} */
export const EMPTY = { states: [], position: -1, moving: null };

// Enough for a session at the sliders; each is a few numbers.
const LONGEST = 200;

/**
 * Return the default mix now, or null before the server has told it.
 * @param {History} history @returns {State | null}
 */
export function current(history) {
  return history.states[history.position] ?? null;
}

/**
 * Return the history after the server has told its default mix.
 * @param {History} history @param {State} told @returns {History}
 */
export function watched(history, told) {
  const { states, position, moving } = history;
  const now = current(history);
  if (now !== null && now.generation === told.generation && now.digest === told.digest) return history;
  const arrived = moving !== null && sameMix(states[moving].mix, told.mix);
  // An adapter that is replaced makes a generation of the same mix, which is no step to undo.
  if (arrived || (now !== null && sameMix(now.mix, told.mix))) {
    const place = arrived ? moving : position;
    return { states: states.map((state, index) => (index === place ? told : state)), position: place, moving: null };
  }
  const kept = [...states.slice(0, position + 1), told].slice(-LONGEST);
  return { states: kept, position: kept.length - 1, moving: null };
}

/**
 * Return the history after the answer to a change: an answer may come later than a newer event.
 * @param {History} history @param {State} told @returns {History}
 */
export function answered(history, told) {
  const now = current(history);
  return now !== null && told.generation <= now.generation
    ? { ...history, moving: null }
    : watched(history, told);
}

/**
 * Return the history of which `step` (-1 undo, 1 redo) was asked, or null where there is none.
 * @param {History} history @param {-1 | 1} step @returns {History | null}
 */
export function moved(history, step) {
  const moving = history.position + step;
  return history.states[moving] === undefined ? null : { ...history, moving };
}
