/** What the page knows: the shape of its one state, and the changes that several parts make. */

import * as history from "./history.js";
import { BASE, mixOf } from "./mix.js";

/**
 * @typedef {import("./mix.js").Mix} Mix
 * @typedef {object} Prompt  What to generate from, and how.
 * @property {string} text
 * @property {boolean} chat  Whether the base's chat template is put around it.
 * @property {number} maxTokens
 * @property {number} temperature  0 is greedy.
 * @property {number} seed
 *
 * @typedef {object} State
 * @property {"connecting" | "live" | "lost" | "refused"} connection
 * @property {string} refusal  Why the server does not answer to the token that the page has, or to
 *   none; "": it does.
 * @property {string} trouble  What else the server refuses of what the page follows, in its words; "": nothing.
 * @property {any} server  GetServerInfoResponse; null before it has come.
 * @property {number | null} tokensPerSecond  Of all rows of the server; null if not known yet.
 * @property {import("./history.js").State | null} resident  The mix that is in the weights.
 * @property {import("./history.js").History} history  The default mixes that were watched.
 * @property {readonly any[]} adapters  As GET /v1/adapters lists them; their `domain`s are the sliders.
 * @property {ReadonlyMap<string, Mix>} named  Named mixes.
 * @property {Mix} mine  The mix of the sliders.
 * @property {Prompt} prompt
 * @property {string} said  What has just happened, for everybody to read and hear; "": nothing.
 *
 * @typedef {import("./store.js").Store<State>} Store
 */

/** @type {State} */
export const INITIAL = {
  connection: "connecting",
  refusal: "",
  trouble: "",
  server: null,
  tokensPerSecond: null,
  resident: null,
  history: history.EMPTY,
  adapters: [],
  named: new Map(),
  mine: BASE,
  prompt: { text: "", chat: false, maxTokens: 64, temperature: 0, seed: 1 },
  said: "",
};

/**
 * Move the sliders.
 * @param {Store} store @param {Mix} mix
 */
export function setMine(store, mix) {
  store.set({ mine: mixOf(mix) });
}

const SAID_FOR = 6000; // ms

/**
 * Say what has happened, where everybody sees it for a while and a screen reader reads it.
 * @param {Store} store @param {string} said
 */
export function say(store, said) {
  store.set({ said });
  setTimeout(() => store.get().said === said && store.set({ said: "" }), SAID_FOR);
}

/** @param {State} state @returns {import("./history.js").State | null} */
export const defaultState = (state) => history.current(state.history);

/** @param {State} state @returns {Mix} The default mix; the base until it is known. */
export const defaultMix = (state) => defaultState(state)?.mix ?? BASE;
