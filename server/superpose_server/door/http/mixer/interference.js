/** How the deltas of the sliders' mix lie to each other: cosines, sizes, and what a fold would lose. */

import { ask } from "./api.js";
import { formatMix, mixToJson } from "./mix.js";
import { Foldout, Problem } from "./panel.js";
import { useStore } from "./store.js";
import { html, useEffect, useState } from "./vendor/htm-preact.js";
import { Wide } from "./wide.js";

/**
 * @typedef {import("./state.js").Store} Store
 * @typedef {import("./state.js").State} State
 */

const STILL_FOR = 500; // ms, before a mix is analysed

/** @param {{store: Store}} props */
export function InterferenceSection({ store }) {
  const [open, setOpen] = useState(false);
  return html`
    <${Foldout} id="interference" title="Interference" open=${open} onToggle=${setOpen}
      hint="How the deltas of the sliders' mix overlap, without folding anything">
      <${Inside} store=${store} />
    <//>
  `;
}

/** @param {{store: Store}} props */
function Inside({ store }) {
  const { analysis, problem, pending } = useAnalysis(store);
  if (problem) return html`<${Problem}>${problem}<//>`;
  if (analysis === null) return html`<p class="hint">${pending ? "Measuring …" : "Move a slider from 0: there is no delta in the base."}</p>`;
  const { domains, pairs, warnings } = analysis;
  return html`
    <div class=${pending ? "pending" : ""} aria-busy=${pending ? "true" : "false"}>
      <ul class="warnings" aria-label="Warnings" aria-live="polite">
        ${warnings.map((/** @type {string} */ line) => html`<li key=${line}>${line}</li>`)}
        ${warnings.length === 0 && html`<li class="none">Nothing to warn of.</li>`}
      </ul>
      <dl class="measures">
        <div>
          <dt>Interference ratio</dt>
          <dd>${analysis.interference_ratio.toFixed(3)}</dd>
          <dd class="hint">energy that the sum has beyond that of its parts: 0 if they are orthogonal</dd>
        </div>
        <div>
          <dt>Fold error</dt>
          <dd>${(analysis.fold_error ?? Infinity).toPrecision(2)}</dd>
          <dd class="hint">${analysis.folded ? "of the delta, lost to rounding by a fold" : "too much: the mix is served by correction"}</dd>
        </div>
      </dl>
      <${Wide} title="Sizes">
        <table class="sizes">
          <thead><tr><th scope="col">domain</th><th scope="col">weight</th><th scope="col">norm of its delta</th><th scope="col">of the base</th></tr></thead>
          <tbody>
            ${domains.map((/** @type {any} */ each) => html`
              <tr key=${each.domain}>
                <th scope="row">${each.domain}</th><td>${each.weight}</td><td>${each.delta_norm.toPrecision(3)}</td>
                <td>${(100 * (each.relative_norm ?? Infinity)).toPrecision(2)} %</td>
              </tr>
            `)}
          </tbody>
        </table>
      <//>
      ${pairs.length > 0
        ? html`<${Cosines} pairs=${pairs} />`
        : html`<p class="hint">With a second domain in the mix there are cosines to show.</p>`}
    </div>
  `;
}

/**
 * Return the analysis of the sliders' mix, asked for anew when that means other deltas: while this is
 * shown, and once the sliders have stood still.
 * @param {Store} store
 */
function useAnalysis(store) {
  const meaning = useStore(store, meaningOf);
  const [analysis, setAnalysis] = useState(/** @type {any} */ (null));
  const [problem, setProblem] = useState("");
  const [pending, setPending] = useState(false);
  useEffect(() => {
    const { mine } = store.get();
    setProblem("");
    setPending(mine.size > 0);
    if (mine.size === 0) {
      setAnalysis(null);
      return undefined;
    }
    const ending = new AbortController();
    const waiting = setTimeout(async () => {
      try {
        setAnalysis(await ask("POST", "v1/mix/analyze", { mix: mixToJson(mine) }, { signal: ending.signal }));
      } catch (error) {
        if (!ending.signal.aborted) setProblem(/** @type {Error} */ (error).message);
      }
      if (!ending.signal.aborted) setPending(false);
    }, STILL_FOR);
    return () => {
      clearTimeout(waiting);
      ending.abort();
    };
  }, [meaning]);
  return { analysis, problem, pending };
}

/** @param {State} state @returns {string} The sliders' mix, and the adapters that it means. */
function meaningOf({ mine, adapters }) {
  const used = adapters.filter(({ domain }) => mine.has(domain)).map(({ digest }) => digest);
  return [formatMix(mine), ...used].join(" ");
}

/** @param {{pairs: readonly any[]}} props */
function Cosines({ pairs }) {
  const [picked, setPicked] = useState("");
  const types = [...new Set(pairs.flatMap((pair) => pair.module_types.map((/** @type {any} */ each) => each.module_type)))];
  const strongest = Math.max(...pairs.flatMap((pair) => pair.module_types.map((/** @type {any} */ each) => each.cosine_rms)));
  const shown = pairs.find((pair) => nameOf(pair) === picked) ?? pairs[0];
  return html`
    <${Wide} title="Cosines between deltas, by module type"
      hint="Root mean square over its modules; the strongest is ${strongest.toFixed(3)}.">
      <table class="heat">
        <thead>
          <tr>
            <th scope="col">pair</th>
            ${types.map((type) => html`<th scope="col" key=${type}>${type}</th>`)}
            <th scope="col">all</th><th scope="col">by chance</th>
          </tr>
        </thead>
        <tbody>
          ${pairs.map((pair) => {
            const cosines = new Map(pair.module_types.map((/** @type {any} */ each) => [each.module_type, each.cosine_rms]));
            return html`
              <tr key=${nameOf(pair)}>
                <th scope="row">
                  <button type="button" class="chip" aria-pressed=${pair === shown ? "true" : "false"}
                    title="Show its layers" onClick=${() => setPicked(nameOf(pair))}>${nameOf(pair)}</button>
                </th>
                ${types.map((type) => html`<${Cell} key=${type} cosine=${cosines.get(type)} strongest=${strongest} />`)}
                <td>${pair.cosine_rms.toFixed(3)}</td><td>${pair.random_floor.toFixed(3)}</td>
              </tr>
            `;
          })}
        </tbody>
      </table>
    <//>
    <${Layers} pair=${shown} />
  `;
}

/** Cosines of one pair, module by module. @param {{pair: any}} props */
function Layers({ pair }) {
  /** @type {Map<string, Map<string, number>>} */
  const byType = new Map();
  const layers = new Set();
  for (const { module, cosine } of pair.modules) {
    const [layer, type] = placeOf(module);
    layers.add(layer);
    byType.set(type, (byType.get(type) ?? new Map()).set(layer, cosine));
  }
  const strongest = Math.max(...pair.modules.map((/** @type {any} */ each) => Math.abs(each.cosine)));
  const inOrder = [...layers].sort((one, other) => one.localeCompare(other, "en", { numeric: true }));
  return html`
    <${Wide} title="${nameOf(pair)}, layer by layer"
      hint="Above 0 they pull the same way, below 0 against each other; the strongest is ${strongest.toFixed(3)}.">
      <table class="heat">
        <thead>
          <tr><th scope="col">layer</th>${inOrder.map((layer) => html`<th scope="col" key=${layer}>${layer}</th>`)}</tr>
        </thead>
        <tbody>
          ${[...byType].map(([type, cosines]) => html`
            <tr key=${type}>
              <th scope="row">${type}</th>
              ${inOrder.map((layer) => html`<${Cell} key=${layer} cosine=${cosines.get(layer)} strongest=${strongest} />`)}
            </tr>
          `)}
        </tbody>
      </table>
    <//>
  `;
}

/** @param {{cosine: number | undefined, strongest: number}} props */
function Cell({ cosine, strongest }) {
  if (cosine === undefined) return html`<td>–</td>`;
  const heat = strongest > 0 ? Math.abs(cosine) / strongest : 0;
  return html`
    <td class=${cosine < 0 ? "against" : "with"} style=${{ "--heat": `${Math.round(45 * heat)}%` }}>${cosine.toFixed(3)}</td>
  `;
}

/** @param {any} pair */
const nameOf = ({ first, second }) => `${first}, ${second}`;

/**
 * Return the layer and the type of a module: what its name says up to the last number, and after it.
 * @param {string} module @returns {[string, string]}
 */
function placeOf(module) {
  const parts = module.split(".");
  const at = parts.map((part) => /^\d+$/.test(part)).lastIndexOf(true);
  return at < 0 ? ["–", module] : [parts[at], parts.slice(at + 1).join(".")];
}
