/** What runs here, and what it does just now. */

import { formatMix } from "./mix.js";
import { defaultState } from "./state.js";
import { useStore } from "./store.js";
import { html } from "./vendor/htm-preact.js";

/** @typedef {import("./state.js").Store} Store */

const WORDS = { connecting: "connecting", live: "ready", lost: "server lost, trying again", refused: "token needed" };

/** @param {{store: Store}} props */
export function Header({ store }) {
  const server = useStore(store, (state) => state.server);
  const connection = useStore(store, (state) => state.connection);
  const trouble = useStore(store, (state) => state.trouble);
  const damaged = connection === "live" && server !== null && !server.weights_intact;
  const wrong = damaged ? "the weights are damaged: run adapterctl verify" : trouble && `${trouble}; trying again`;
  return html`
    <header>
      <h1>Superpose</h1>
      ${server &&
      html`<p class="base">
        <b>${server.base}</b> <span>${server.dtype}</span> <span>${server.device}</span>
      </p>`}
      <p class="readiness ${wrong ? "lost" : connection}" role="status">
        <span class="dot" aria-hidden="true"></span>
        ${wrong || WORDS[connection]}
      </p>
    </header>
  `;
}

/** @param {{store: Store}} props */
export function Live({ store }) {
  const server = useStore(store, (state) => state.server);
  const state = useStore(store, defaultState);
  const resident = useStore(store, (state) => state.resident);
  const speed = useStore(store, (state) => state.tokensPerSecond);
  return html`
    <section aria-label="Live"><dl class="live">
      <${Fact} name="Default mix">${state && formatMix(state.mix)}<//>
      <${Fact} name="In the weights">${resident && formatMix(resident.mix)}<//>
      <${Fact} name="Generation">${state?.generation}<//>
      <${Fact} name="Digest">
        ${state && html`<code title=${state.digest}>${state.digest.slice(0, 12)}</code>`}
      <//>
      <${Fact} name="Rows">${server && `${server.running} running, ${server.waiting} waiting`}<//>
      <${Fact} name="Tokens a second">${speed !== null && speed.toFixed(speed < 10 ? 1 : 0)}<//>
      <${Fact} name="Up">${server && duration(server.uptime_seconds)}<//>
    </dl></section>
  `;
}

/** @param {{name: string, children?: any}} props */
function Fact({ name, children }) {
  const known = ![children].flat().every((each) => each === null || each === undefined || each === false);
  return html`<div><dt>${name}</dt><dd>${known ? children : "–"}</dd></div>`;
}

/** @param {number} seconds */
function duration(seconds) {
  const minutes = Math.floor(seconds / 60);
  if (minutes < 1) return `${Math.floor(seconds)} s`;
  if (minutes < 60) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.floor(hours / 24)} days`;
}
