/** Perplexity as a curve over the weight of one domain, the others as the sliders stand. */

import { ask } from "./api.js";
import { CurveChart } from "./curve_chart.js";
import { short } from "./chart.js";
import { BASE, formatMix, mixOf, mixToJson, sameMix, withWeight } from "./mix.js";
import { Foldout, Problem } from "./panel.js";
import { SampleInput, countRows, measured, useSources } from "./sample.js";
import { defaultMix, say, setMine } from "./state.js";
import { useStore } from "./store.js";
import { html, useEffect, useRef, useState } from "./vendor/htm-preact.js";

/**
 * @typedef {import("./state.js").Store} Store
 * @typedef {import("./mix.js").Mix} Mix
 *
 * @typedef {object} Curve
 * @property {string} domain
 * @property {Mix} others  The mix without that domain.
 * @property {readonly {weight: number, perplexity: number}[]} points
 * @property {readonly {name: string, perplexity: number}[]} references  Mixes to compare with.
 * @property {number} tokens  That it rests on.
 * @property {number} rows
 */

/** Every eighth from -1 to 2, so that 0, 1/2 and 1 are among them. */
const WEIGHTS = Array.from({ length: 25 }, (_, at) => -1 + at / 8);
const MOST_ALONE = 6;

/** @param {{store: Store}} props */
export function CurveSection({ store }) {
  const [open, setOpen] = useState(false);
  return html`
    <${Foldout} id="curve" title="Curve" hint="Perplexity over one domain's weight" open=${open} onToggle=${setOpen}>
      <${Inside} store=${store} />
    <//>
  `;
}

/** @param {{store: Store}} props */
function Inside({ store }) {
  const adapters = useStore(store, (state) => state.adapters);
  const mostRows = useStore(store, (state) => state.server?.limits.max_score_rows ?? 1);
  const mostItems = useStore(store, (state) => state.server?.limits.max_score_items ?? 1);
  const { sources, problem: unread } = useSources();
  const [picked, setPicked] = useState("");
  const [curve, setCurve] = useState(/** @type {Curve | null} */ (null));
  const [running, setRunning] = useState(/** @type {AbortController | null} */ (null));
  const [problem, setProblem] = useState("");
  const ending = useRef(/** @type {AbortController | null} */ (null));
  useEffect(() => () => ending.current?.abort(), []);

  const domain = adapters.some((each) => each.domain === picked) ? picked : (adapters[0]?.domain ?? "");
  const most = Math.min(mostItems, Math.floor(mostRows / (WEIGHTS.length + MOST_ALONE + 2)));
  const draw = async () => {
    const controller = new AbortController();
    ending.current = controller;
    setRunning(controller);
    setProblem("");
    try {
      const drawn = await measure(store, domain, measured(sources, most), controller.signal);
      setCurve(drawn);
      say(store, `The curve of ${domain} is drawn.`);
    } catch (error) {
      if (!controller.signal.aborted) setProblem(/** @type {Error} */ (error).message);
    }
    setRunning(null);
  };
  return html`
    <${SampleInput} id="curve" sources=${sources} problem=${unread} most=${most} />
    <div class="actions">
      <label class="field">
        Over the weight of
        <select value=${domain} onChange=${(/** @type {any} */ event) => setPicked(event.currentTarget.value)}>
          ${adapters.map(({ domain }) => html`<option key=${domain} value=${domain}>${domain}</option>`)}
        </select>
      </label>
      <button type="button" class="main" onClick=${draw}
        disabled=${running !== null || domain === "" || countRows(sources) === 0}>
        Draw the curve
      </button>
      <button type="button" disabled=${running === null} onClick=${() => running?.abort()}>Stop</button>
      ${running && html`<span class="hint">${WEIGHTS.length} weights, in one request …</span>`}
    </div>
    ${problem && html`<${Problem}>${problem}<//>`}
    ${curve && html`<${Drawn} store=${store} curve=${curve} />`}
  `;
}

/**
 * Return the curve of what one request scores under all of its mixes.
 * @param {Store} store @param {string} domain @param {ReturnType<typeof measured>} sample
 * @param {AbortSignal} signal
 * @returns {Promise<Curve>}
 */
async function measure(store, domain, { sourceOf, ...items }, signal) {
  const { mine, adapters } = store.get();
  const others = withWeight(mine, domain, 0);
  const alone = new Set([domain, ...others.keys(), ...adapters.map((each) => each.domain)]);
  const names = [...alone].filter((name) => adapters.some((each) => each.domain === name));
  const references = [
    { name: "base", mix: BASE },
    { name: "default mix", mix: defaultMix(store.get()) },
    ...names.slice(0, MOST_ALONE).map((name) => ({ name: `${name} alone`, mix: mixOf([[name, 1]]) })),
  ].filter(({ mix }, at, all) => all.findIndex((each) => sameMix(each.mix, mix)) === at);
  const mixes = [...WEIGHTS.map((weight) => withWeight(others, domain, weight)), ...references.map(({ mix }) => mix)];
  const answer = await ask("POST", "v1/score", { ...items, mixes: mixes.map(mixToJson) }, { signal });
  if (answer.tokens === 0) throw new Error("there is nothing to measure: no row has a token that counts");
  const perplexities = answer.mixes.map((/** @type {any} */ mix) => mix.perplexity);
  const beyond = perplexities.indexOf(null);
  if (beyond >= 0) {
    throw new Error(`the perplexity under ${formatMix(mixes[beyond])} is larger than a number can be: use smaller weights`);
  }
  return {
    domain,
    others,
    points: WEIGHTS.map((weight, at) => ({ weight, perplexity: perplexities[at] })),
    references: references.map(({ name }, at) => ({ name, perplexity: perplexities[WEIGHTS.length + at] })),
    tokens: answer.tokens,
    rows: sourceOf.length,
  };
}

/** @param {{store: Store, curve: Curve}} props */
function Drawn({ store, curve }) {
  const { domain, others, points, references, rows, tokens } = curve;
  const mine = useStore(store, (state) => state.mine);
  const here = mine.get(domain) ?? 0;
  const best = points.reduce((one, other) => (other.perplexity < one.perplexity ? other : one));
  const moved = !sameMix(withWeight(mine, domain, 0), others);
  const take = () => {
    setMine(store, withWeight(others, domain, best.weight));
    say(store, `The sliders stand at ${formatMix(withWeight(others, domain, best.weight))}.`);
  };
  return html`
    <${CurveChart} domain=${domain} points=${points} references=${references} best=${best} here=${moved ? null : here} />
    <p class="hint">
      ${`${rows} ${rows === 1 ? "row" : "rows"}, ${tokens.toLocaleString("en")} tokens; beside ${domain}: ${formatMix(others)}.`}
      ${moved && " The other sliders have moved since: draw it again to see what they change."}
    </p>
    <div class="actions">
      <button type="button" onClick=${take}>Take the best weight, ${best.weight}</button>
    </div>
    <details class="values">
      <summary>As a table</summary>
      <table>
        <thead><tr><th scope="col">${domain}</th><th scope="col">perplexity</th></tr></thead>
        <tbody>
          ${points.map(({ weight, perplexity }) => html`
            <tr key=${weight}><th scope="row">${weight}${weight === best.weight && " (best)"}</th><td>${short(perplexity)}</td></tr>
          `)}
          ${references.map(({ name, perplexity }) => html`
            <tr key=${name}><th scope="row">${name}</th><td>${short(perplexity)}</td></tr>
          `)}
        </tbody>
      </table>
    </details>
  `;
}
