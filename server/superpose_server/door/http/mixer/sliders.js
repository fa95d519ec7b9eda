/** The mix of the sliders: a weight for every domain that is loaded. */

import { BASE, MAX_WEIGHT, formatMix, mixOf, mixOfState, parseMix, parseWeight, sameMix, withWeight } from "./mix.js";
import { Problem } from "./panel.js";
import { defaultMix, setMine } from "./state.js";
import { useStore } from "./store.js";
import { html, useEffect, useState } from "./vendor/htm-preact.js";

/** @typedef {import("./state.js").Store} Store */

const LOWEST = -1;
const HIGHEST = 2;
const STEP = 0.05;

/** @param {{store: Store}} props */
export function Sliders({ store }) {
  const adapters = useStore(store, (state) => state.adapters);
  return html`
    <${Presets} store=${store} />
    ${adapters.length === 0 &&
    html`<p class="hint">No adapter is loaded yet: <code>adapterctl push NAME FOLDER</code> loads one.</p>`}
    <ul class="sliders">
      ${adapters.map(({ domain, provenance }) => html`
        <${Slider} key=${domain} store=${store} domain=${domain} provenance=${provenance} />`)}
    </ul>
    <${Written} store=${store} />
  `;
}

/** @param {{store: Store, domain: string, provenance: any}} props */
function Slider({ store, domain, provenance }) {
  const weight = useStore(store, (state) => state.mine.get(domain) ?? 0);
  const served = useStore(store, (state) => defaultMix(state).get(domain) ?? 0);
  const set = (/** @type {number} */ weight) => {
    setMine(store, withWeight(store.get().mine, domain, weight));
  };
  const zero = share(0);
  const here = share(weight);
  const filled = { "--from": `${Math.min(zero, here)}%`, "--to": `${Math.max(zero, here)}%` };
  return html`
    <li class=${weight === 0 ? "absent" : ""}>
      <label for="weight-${domain}">${domain}</label>
      <span class="served">${served === weight ? "" : `default ${served}`}</span>
      <${WeightInput} domain=${domain} weight=${weight} onWeight=${set} />
      <input type="range" id="weight-${domain}" min=${LOWEST} max=${HIGHEST} step=${STEP}
        style=${filled} value=${weight} aria-valuetext=${weight === 0 ? "0, absent" : String(weight)}
        onInput=${(/** @type {any} */ event) => set(Number(event.currentTarget.value))} />
      ${provenance && html`<span class="hint merged">${mergedFrom(provenance)}</span>`}
    </li>
  `;
}

/**
 * Return how an adapter was merged: method, options and mix.
 * @param {{method: string, options: Record<string, unknown>, parts: {domain: string, weight: number}[]}} provenance
 */
function mergedFrom({ method, options, parts }) {
  const words = Object.entries(options).map(([name, value]) => ` ${name}=${value}`);
  return `${method}${words.join("")} of ${formatMix(mixOfState({ entries: parts }))}`;
}

/**
 * The weight as a number, which may be any that the server takes, beyond the slider's ends too.
 * @param {{domain: string, weight: number, onWeight: (weight: number) => void}} props
 */
function WeightInput({ domain, weight, onWeight }) {
  const [text, setText] = useState(String(weight));
  // What is being typed stays as it is typed ("1." or "-"), unless the weight becomes another.
  useEffect(() => {
    if (Number(text) !== weight) setText(String(weight));
  }, [weight]);
  const valid = isWeight(text);
  return html`
    <input class="number" inputmode="decimal" autocomplete="off" value=${text}
      aria-label="Weight of ${domain}" aria-invalid=${valid ? null : "true"}
      title=${valid ? "" : `A number from -${MAX_WEIGHT} to ${MAX_WEIGHT}`}
      onInput=${(/** @type {any} */ event) => {
        const typed = event.currentTarget.value;
        setText(typed);
        if (isWeight(typed)) onWeight(parseWeight(typed));
      }}
      onBlur=${() => setText(String(weight))} />
  `;
}

/** @param {string} text */
function isWeight(text) {
  try {
    parseWeight(text);
    return true;
  } catch {
    return false;
  }
}

/** Mixes that are one press away. @param {{store: Store}} props */
function Presets({ store }) {
  const adapters = useStore(store, (state) => state.adapters);
  const named = useStore(store, (state) => state.named);
  const served = useStore(store, defaultMix);
  const mine = useStore(store, (state) => state.mine);
  /** @type {[string, string, import("./mix.js").Mix][]} */
  const presets = [
    ["base", "word", BASE],
    ["default", "word", served],
    ...adapters.map(({ domain }) => /** @type {[string, string, any]} */ ([domain, "", mixOf([[domain, 1]])])),
    ...[...named].map(([name, mix]) => /** @type {[string, string, any]} */ ([name, "named", mix])),
  ];
  return html`
    <div class="chips" role="group" aria-label="Move the sliders to">
      ${presets.map(
        ([name, kind, mix]) => html`
          <button type="button" class="chip ${kind}" key="${kind} ${name}" title=${formatMix(mix)}
            aria-pressed=${sameMix(mix, mine) ? "true" : "false"} onClick=${() => setMine(store, mix)}>
            ${name}
          </button>
        `,
      )}
    </div>
  `;
}

/** The mix as text, to read, copy and paste. @param {{store: Store}} props */
function Written({ store }) {
  const mine = useStore(store, (state) => state.mine);
  const [typed, setTyped] = useState(/** @type {string | null} */ (null));
  const [problem, setProblem] = useState("");
  // What was typed and not taken is no mix of the sliders once they have moved.
  useEffect(() => {
    setTyped(null);
    setProblem("");
  }, [mine]);
  const take = (/** @type {string} */ text) => {
    const { named, adapters } = store.get();
    try {
      const mix = parseMix(text, named, defaultMix(store.get()));
      const unknown = [...mix.keys()].find((name) => !adapters.some(({ domain }) => domain === name));
      if (unknown !== undefined) throw new Error(`${unknown} is neither a domain that is loaded nor a named mix`);
      setMine(store, mix);
    } catch (error) {
      setProblem(/** @type {Error} */ (error).message);
    }
  };
  return html`
    <form class="written" onSubmit=${(/** @type {any} */ event) => {
      event.preventDefault();
      if (typed !== null) take(typed);
    }}>
      <label for="mix-text">As text</label>
      <input id="mix-text" autocomplete="off" spellcheck=${false} value=${typed ?? formatMix(mine)}
        onInput=${(/** @type {any} */ event) => setTyped(event.currentTarget.value)}
        onBlur=${() => typed !== null && take(typed)} />
    </form>
    ${problem && html`<${Problem}>${problem}<//>`}
  `;
}

/** @param {number} weight @returns {number} Where it lies on the slider, in percent. */
function share(weight) {
  const within = Math.min(HIGHEST, Math.max(LOWEST, weight));
  return ((within - LOWEST) / (HIGHEST - LOWEST)) * 100;
}
