/** Weights that are fitted instead of guessed: a search that the server runs, and what it found. */

import { events } from "./api.js";
import { formatMix, mixOf, mixOfState } from "./mix.js";
import { NumberField } from "./number_field.js";
import { Foldout, Problem } from "./panel.js";
import { SampleInput, countRows, measured, useSources } from "./sample.js";
import { say, setMine } from "./state.js";
import { useStore } from "./store.js";
import { html, useEffect, useRef, useState } from "./vendor/htm-preact.js";
import { Wide } from "./wide.js";

/**
 * @typedef {import("./state.js").Store} Store
 *
 * @typedef {object} Found  What a fit has found, or has so far.
 * @property {any} progress  FitProgress; null before the first, and once there is a result.
 * @property {any} result  FitResult; null until it is there.
 * @property {readonly string[]} sourceOf  The name of the source of each row that was sent.
 */

const MOST_DOMAINS = 8;

/** @param {{store: Store}} props */
export function FitSection({ store }) {
  const [open, setOpen] = useState(false);
  return html`
    <${Foldout} id="fit" title="Fit" hint="The weights that lose least on rows of yours" open=${open} onToggle=${setOpen}>
      <${Inside} store=${store} />
    <//>
  `;
}

/** @param {{store: Store}} props */
function Inside({ store }) {
  const adapters = useStore(store, (state) => state.adapters);
  const most = useStore(store, (state) => state.server?.limits.max_score_items ?? 1);
  const { sources, problem: unread } = useSources();
  const [left, setLeft] = useState(() => leftFirst(store.get()));
  const [options, setOptions] = useState({ budget: "", low: "-1", high: "2", penalty: "0.01" });
  const [found, setFound] = useState(/** @type {Found | null} */ (null));
  const [running, setRunning] = useState(/** @type {AbortController | null} */ (null));
  const [problem, setProblem] = useState("");
  const ending = useRef(/** @type {AbortController | null} */ (null));
  useEffect(() => () => ending.current?.abort(), []); // The server ends what nobody waits for.

  const domains = adapters.map(({ domain }) => domain).filter((domain) => !left.has(domain));
  const fits = domains.length > 0 && domains.length <= MOST_DOMAINS;
  const ready = running === null && countRows(sources) > 1 && fits;
  const run = async () => {
    const controller = new AbortController();
    ending.current = controller;
    setRunning(controller);
    setProblem("");
    const { sourceOf, ...items } = measured(sources, most);
    const asked = Object.entries(options).filter(([, value]) => value !== "");
    const names = [...new Set(sourceOf)];
    const numbers = sourceOf.map((name) => names.indexOf(name));
    const body = { ...items, sources: numbers, domains, ...Object.fromEntries(asked.map(([name, value]) => [name, Number(value)])) };
    setFound({ progress: null, result: null, sourceOf });
    try {
      for await (const { progress, result } of events("POST", "v1/mix/fit", body, { signal: controller.signal })) {
        setFound({ progress, result, sourceOf });
        if (result) say(store, `Fitted: ${formatMix(mixOfState(result.candidates[0].mix))}.`);
      }
    } catch (error) {
      setFound(null);
      if (!controller.signal.aborted) setProblem(/** @type {Error} */ (error).message);
    }
    setRunning(null);
  };
  return html`
    <${SampleInput} id="fit" sources=${sources} problem=${unread} most=${most} />
    <fieldset class="options">
      <legend>Weights of</legend>
      ${adapters.map(({ domain }) => html`
        <label class="switch" key=${domain}>
          <input type="checkbox" checked=${!left.has(domain)}
            onChange=${(/** @type {any} */ event) => setLeft(without(left, domain, event.currentTarget.checked))} />
          ${domain}
        </label>
      `)}
      ${!fits && html`<span class="hint">1 to ${MOST_DOMAINS} at a time</span>`}
    </fieldset>
    <div class="options">
      <${NumberField} name="Mixes to try" placeholder=${20 + 10 * domains.length} min=${1} max=${512} step=${1} value=${options.budget}
        onValue=${(/** @type {string} */ budget) => setOptions({ ...options, budget })} />
      <${NumberField} name="Least weight" min=${-10000} max=${10000} step="any" value=${options.low}
        onValue=${(/** @type {string} */ low) => setOptions({ ...options, low })} />
      <${NumberField} name="Greatest" min=${-10000} max=${10000} step="any" value=${options.high}
        onValue=${(/** @type {string} */ high) => setOptions({ ...options, high })} />
      <${NumberField} name="Penalty of a unit" min=${0} max=${1000} step="any" value=${options.penalty}
        onValue=${(/** @type {string} */ penalty) => setOptions({ ...options, penalty })} />
    </div>
    <div class="actions">
      <button type="button" class="main" disabled=${!ready} onClick=${run}>Fit the weights</button>
      <button type="button" disabled=${running === null} onClick=${() => running?.abort()}>Stop</button>
      ${countRows(sources) < 2 && html`<span class="hint">Two rows or more: about a third is held out.</span>`}
    </div>
    ${problem && html`<${Problem}>${problem}<//>`}
    ${found && !found.result && html`<${Progress} progress=${found.progress} />`}
    ${found?.result && html`<${Result} store=${store} result=${found.result} sourceOf=${found.sourceOf} />`}
  `;
}

/**
 * Return the domains that are left out at first: none, or of too many those that the sliders leave out.
 * @param {import("./state.js").State} state @returns {ReadonlySet<string>}
 */
function leftFirst({ adapters, mine }) {
  const domains = adapters.map(({ domain }) => domain);
  return new Set(domains.length > MOST_DOMAINS ? domains.filter((domain) => !mine.has(domain)) : []);
}

/**
 * @param {ReadonlySet<string>} names @param {string} name @param {boolean} gone
 * @returns {ReadonlySet<string>}
 */
function without(names, name, gone) {
  const others = [...names].filter((each) => each !== name);
  return new Set(gone ? others : [...others, name]);
}

/** @param {{progress: any}} props */
function Progress({ progress }) {
  return html`
    <div class="fitting">
      <progress aria-label="Mixes tried" max=${progress?.budget ?? 1} value=${progress?.evaluations ?? 0}></progress>
      <p class="hint">
        ${progress
          ? `${progress.evaluations} of at most ${progress.budget} mixes; best so far ${formatMix(mixOfWeights(progress.weights))}, ` +
            `${progress.loss.toFixed(4)} nats a token`
          : "The first round …"}
      </p>
    </div>
  `;
}

/** @param {readonly {domain: string, weight: number}[]} weights */
const mixOfWeights = (weights) => mixOf(weights.map(({ domain, weight }) => [domain, weight]));

/** @param {{store: Store, result: any, sourceOf: readonly string[]}} props */
function Result({ store, result, sourceOf }) {
  const fitted = mixOfState(result.candidates[0].mix);
  const sources = [...new Set(sourceOf)];
  return html`
    <p>
      <b>${formatMix(fitted)}</b>
      <span class="hint">${` fitted on ${result.fitted_rows} rows, ${result.fitted_tokens.toLocaleString("en")} tokens; held out ` +
        `${result.held_out_rows} rows, ${result.held_out_tokens.toLocaleString("en")} tokens; ${result.evaluations} mixes tried`}</span>
    </p>
    ${result.warnings.length > 0 && html`
      <ul class="warnings" aria-label="Warnings">
        ${result.warnings.map((/** @type {string} */ line) => html`<li key=${line}>${line}</li>`)}
      </ul>
    `}
    <${Wide} title="Losses" hint="Nats a token, lower is better; with 95 % intervals.">
      <table class="losses">
        <thead>
          <tr>
            <th scope="col">mix</th><th scope="col">fitted on</th><th scope="col">held out</th><th scope="col">over the fit</th>
          </tr>
        </thead>
        <tbody>
          ${result.candidates.map((/** @type {any} */ candidate, /** @type {number} */ at) => html`
            <tr key=${at} class=${at === 0 ? "fitted" : ""}>
              <th scope="row">${spaced(candidate.mix)}</th>
              <td>${candidate.fitted_loss.toFixed(3)}</td>
              <td>${estimate(candidate.held_out_loss, "")}</td>
              <td>${at > 0 && estimate(candidate.excess, "+")}</td>
            </tr>
          `)}
        </tbody>
      </table>
    <//>
    ${sources.length > 1 && html`<${BySource} result=${result} sources=${sources} sourceOf=${sourceOf} />`}
    <div class="actions">
      <button type="button" class="main" onClick=${() => {
        setMine(store, fitted);
        say(store, `The sliders stand at ${formatMix(fitted)}.`);
      }}>Take these weights</button>
      <span class="hint">Moves the sliders. The default mix stays as it is.</span>
    </div>
  `;
}

/** @param {{result: any, sources: readonly string[], sourceOf: readonly string[]}} props */
function BySource({ result, sources, sourceOf }) {
  return html`
    <${Wide} title="Held out, by source">
      <table class="losses">
        <thead>
          <tr><th scope="col">mix</th>${sources.map((name) => html`<th scope="col" key=${name}>${name}</th>`)}</tr>
        </thead>
        <tbody>
          ${result.candidates.map((/** @type {any} */ candidate, /** @type {number} */ at) => html`
            <tr key=${at} class=${at === 0 ? "fitted" : ""}>
              <th scope="row">${spaced(candidate.mix)}</th>
              ${sources.map((name) => html`<td key=${name}>${lossOf(result, candidate, sourceOf, name)}</td>`)}
            </tr>
          `)}
        </tbody>
      </table>
    <//>
  `;
}

/** @param {any} state  MixState. @returns {string} Its mix, which may break at its commas. */
const spaced = (state) => formatMix(mixOfState(state)).replaceAll(",", ", ");

/** @param {{value: number, low: number | null, high: number | null}} estimate @param {string} sign */
function estimate({ value, low, high }, sign) {
  const written = (/** @type {number} */ number) => (number > 0 ? sign : "") + number.toFixed(3);
  return html`
    ${written(value)}
    <span class="hint interval">${low === null || high === null ? "too few rows" : `${written(low)} to ${written(high)}`}</span>
  `;
}

/**
 * Return what a mix loses on the held-out rows of one source.
 * @param {any} result @param {any} candidate @param {readonly string[]} sourceOf @param {string} name
 */
function lossOf(result, candidate, sourceOf, name) {
  const items = candidate.held_out_items.filter((/** @type {any} */ _, /** @type {number} */ at) => sourceOf[result.held_out[at]] === name);
  const tokens = items.reduce((/** @type {number} */ sum, /** @type {any} */ item) => sum + item.tokens, 0);
  const logprob = items.reduce((/** @type {number} */ sum, /** @type {any} */ item) => sum + item.logprob, 0);
  return tokens > 0 ? (-logprob / tokens).toFixed(3) : "no row";
}
