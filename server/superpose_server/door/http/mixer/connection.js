/**
 * Keeps the state in step with the server: changes of the default mix are pushed to the page, load
 * and lists are asked for now and then. None of it reaches the engine, so an open page costs no
 * pass. A hidden tab does neither: browsers allow few connections to a server, and tabs share them.
 * Nor does one whose token the server refuses, until it gets another.
 */

import { ApiError, ask, events } from "./api.js";
import { answered, EMPTY, watched } from "./history.js";
import { mixOf, mixOfState } from "./mix.js";
import { keepToken } from "./token.js";

/** @typedef {import("./state.js").Store} Store */

const LOAD_EVERY = 2000; // ms
const LISTS_EVERY = 5; // times that the load is asked for
const FIRST_RETRY = 250; // ms; doubled until
const LAST_RETRY = 8000;

/**
 * Follow the server for as long as the page is open.
 * @param {Store} store
 */
export function follow(store) {
  /** @type {AbortController | null} */
  let following = null;
  const look = () => {
    if (document.hidden || store.get().refusal !== "") {
      following?.abort();
      following = null;
    } else if (following === null) {
      following = new AbortController();
      watchMix(store, following.signal);
      watchLoad(store, following.signal);
    }
  };
  document.addEventListener("visibilitychange", look);
  store.subscribe(look);
  look();
}

/**
 * Go on with another token.
 * @param {Store} store @param {string} token
 */
export function unlock(store, token) {
  keepToken(token);
  store.set({ connection: "connecting", refusal: "" });
}

/**
 * Take in why the page cannot follow: the server wants a token, or another; or says something else.
 * @param {Store} store @param {unknown} error
 */
function takeRefusal(store, error) {
  if (!(error instanceof ApiError)) return;
  if (error.status === 401) store.set({ connection: "refused", refusal: error.message, trouble: "" });
  else store.set({ trouble: error.status > 0 ? error.message : "" });
}

let listings = 0; // How often the lists were asked for.

/**
 * Ask for the lists of adapters and named mixes.
 * @param {Store} store @param {AbortSignal} [signal]
 */
export async function loadLists(store, signal) {
  const listing = ++listings;
  const [adapters, names] = await Promise.all([
    ask("GET", "v1/adapters", undefined, { signal }),
    ask("GET", "v1/mix/names", undefined, { signal }),
  ]);
  if (listing < listings) return; // They were asked for again, and may have changed before that.
  const loaded = new Set(adapters.adapters.map((/** @type {any} */ each) => each.domain));
  const mine = mixOf([...store.get().mine].filter(([domain]) => loaded.has(domain)));
  store.set({
    adapters: adapters.adapters,
    named: new Map(names.named_mixes.map((/** @type {any} */ each) => [each.name, mixOfState(each)])),
    // What is not loaded has no slider; mixes of the same weights stay the same object.
    ...(mine.size < store.get().mine.size ? { mine } : {}),
  });
}

/**
 * Take in the default mix that an answer has told.
 * @param {Store} store @param {any} mix  A MixState.
 */
export function takeIn(store, mix) {
  store.set({ history: answered(store.get().history, toState(mix)) });
}

/** @param {any} mix  A MixState. @returns {import("./history.js").State} */
function toState(mix) {
  return { generation: mix.generation, digest: mix.digest, mix: mixOfState(mix) };
}

/** @param {Store} store @param {AbortSignal} signal */
async function watchMix(store, signal) {
  let wait = FIRST_RETRY;
  while (!signal.aborted) {
    try {
      let begun = false;
      for await (const { mix } of events("GET", "v1/mix/events", undefined, { signal })) {
        const before = store.get().history;
        store.set({
          connection: "live",
          history: watched(before, toState(mix)),
          // The sliders begin where the server stands.
          ...(before === EMPTY ? { mine: mixOfState(mix) } : {}),
        });
        if (!begun) await loadLists(store, signal); // It may be another server now.
        begun = true;
        wait = FIRST_RETRY;
      }
    } catch (error) {
      if (!signal.aborted) takeRefusal(store, error);
    }
    if (signal.aborted) return;
    store.set({ connection: "lost" });
    await pause(wait, signal);
    wait = Math.min(wait * 2, LAST_RETRY);
  }
}

/** @param {Store} store @param {AbortSignal} signal */
async function watchLoad(store, signal) {
  /** @type {{tokens: number, time: number} | null} */
  let last = null;
  for (let count = 1; !signal.aborted; count++) {
    try {
      const [server, { resident }] = await Promise.all([
        ask("GET", "v1/server", undefined, { signal }),
        ask("GET", "v1/mix", undefined, { signal }),
      ]);
      const now = { tokens: server.generated_tokens, time: performance.now() };
      const seconds = last === null ? 0 : (now.time - last.time) / 1000;
      store.set({
        server,
        // What the stream was refused for holds until there is one.
        ...(store.get().connection === "live" ? { trouble: "" } : {}),
        resident: toState(resident),
        tokensPerSecond: last === null ? null : Math.max(0, now.tokens - last.tokens) / seconds,
      });
      last = now;
      if (count % LISTS_EVERY === 0) await loadLists(store, signal);
    } catch (error) {
      if (!signal.aborted) takeRefusal(store, error);
      last = null; // That the server is lost, the stream of its mixes tells.
    }
    await pause(LOAD_EVERY, signal);
  }
}

/** @param {number} milliseconds @param {AbortSignal} signal @returns {Promise<void>} */
function pause(milliseconds, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, milliseconds);
    signal.addEventListener("abort", () => (clearTimeout(timer), resolve()), { once: true });
  });
}
