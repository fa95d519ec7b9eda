/** One state, replaced and never changed, and components that follow a part of it. */

import { useEffect, useReducer, useRef } from "./vendor/htm-preact.js";

/**
 * @template S
 * @typedef {object} Store
 * @property {() => S} get
 * @property {(change: Partial<S>) => void} set  Replaces the fields that `change` names.
 * @property {(told: () => void) => () => void} subscribe  Returns what ends it.
 */

/**
 * Return a store that holds `state`.
 * @template S
 * @param {S} state
 * @returns {Store<S>}
 */
export function createStore(state) {
  /** @type {Set<() => void>} */
  const followers = new Set();
  return {
    get: () => state,
    set(change) {
      state = { ...state, ...change };
      for (const told of [...followers]) told();
    },
    subscribe(told) {
      followers.add(told);
      return () => followers.delete(told);
    },
  };
}

/**
 * Return what `select` picks of the state, and render anew whenever that is another value.
 *
 * It must pick something that is there: an object that `select` makes is another one each time.
 * @template S, T
 * @param {Store<S>} store
 * @param {(state: S) => T} select
 * @returns {T}
 */
export function useStore(store, select) {
  const [, render] = useReducer((/** @type {number} */ count, /** @type {void} */ _) => count + 1, 0);
  const shown = { select, value: select(store.get()) };
  const last = useRef(shown);
  last.current = shown;
  useEffect(() => {
    const tell = () => {
      const { select, value } = last.current;
      if (!Object.is(select(store.get()), value)) render();
    };
    tell(); // The state may have changed since this was rendered.
    return store.subscribe(tell);
  }, [store]);
  return shown.value;
}
