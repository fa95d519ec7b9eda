/** The drawing of a curve: the line, what to compare it with, and a mark that reads it. */

import { linear, logarithmic, logarithmicTicks, short, useWidth } from "./chart.js";
import { html, useState } from "./vendor/htm-preact.js";

/**
 * @typedef {{weight: number, perplexity: number}} Point
 * @typedef {{name: string, perplexity: number}} Reference
 */

const HEIGHT = 300;
const MARGIN = { top: 22, right: 12, bottom: 34, left: 52 };
const X_TICKS = [-1, -0.5, 0, 0.5, 1, 1.5, 2];
/** Dashes that tell lines apart where colours do not. */
const DASHES = ["2 3", "8 3", "5 2 1 2", "10 3 2 3", "1 4", "12 4", "6 2 2 2 2 2", "3 6"];

/**
 * @param {{domain: string, points: readonly Point[], references: readonly Reference[], best: Point,
 *          here: number | null}} props  `here`: the weight of the slider; null: it is on no such curve.
 */
export function CurveChart({ domain, points, references, best, here }) {
  const [box, width] = useWidth(640);
  const [read, setRead] = useState(/** @type {number | null} */ (null));
  const values = [...points, ...references].map(({ perplexity }) => perplexity);
  const [low, high] = [Math.min(...values) / 1.06, Math.max(...values) * 1.06];
  const [left, right] = [MARGIN.left, width - MARGIN.right];
  const [top, bottom] = [MARGIN.top, HEIGHT - MARGIN.bottom];
  const x = linear(points[0].weight, points[points.length - 1].weight, left, right);
  const y = logarithmic(low, high, bottom, top);
  const marked = points[read ?? points.indexOf(best)];
  const said = `${domain} ${marked.weight}: perplexity ${short(marked.perplexity)}${marked === best ? ", the best" : ""}`;

  const point = (/** @type {any} */ event) => {
    const weight = (event.clientX - event.currentTarget.getBoundingClientRect().left - left) / (right - left);
    setRead(Math.min(points.length - 1, Math.max(0, Math.round(weight * (points.length - 1)))));
  };
  const press = (/** @type {KeyboardEvent} */ event) => {
    const from = read ?? points.indexOf(best);
    const to = new Map([
      ["ArrowLeft", from - 1], ["ArrowDown", from - 1], ["ArrowRight", from + 1], ["ArrowUp", from + 1],
      ["Home", 0], ["End", points.length - 1],
    ]).get(event.key);
    if (to === undefined) return;
    event.preventDefault();
    setRead(Math.min(points.length - 1, Math.max(0, to)));
  };
  return html`
    <figure class="chart" ref=${box}>
      <h3>Perplexity over the weight of ${domain}</h3>
      <svg width=${width} height=${HEIGHT} viewBox="0 0 ${width} ${HEIGHT}" tabindex="0" role="slider"
        aria-label="Perplexity over the weight of ${domain}" aria-valuemin=${points[0].weight}
        aria-valuemax=${points[points.length - 1].weight} aria-valuenow=${marked.weight} aria-valuetext=${said}
        onPointerMove=${point} onPointerDown=${point} onPointerLeave=${() => setRead(null)} onKeyDown=${press}>
        ${logarithmicTicks(low, high, 8).map((tick) => html`
          <g key="y ${tick}">
            <line class="grid" x1=${left} x2=${right} y1=${y(tick)} y2=${y(tick)} />
            <text class="tick y" x=${left - 6} y=${y(tick)}>${short(tick)}</text>
          </g>
        `)}
        ${X_TICKS.map((tick) => html`
          <g key="x ${tick}">
            <line class=${tick === 0 ? "grid zero" : "grid"} x1=${x(tick)} x2=${x(tick)} y1=${top} y2=${bottom} />
            <text class="tick x" x=${x(tick)} y=${bottom + 8}>${tick}</text>
          </g>
        `)}
        <text class="tick end" x=${right} y=${HEIGHT - 4}>weight of ${domain}</text>
        ${references.map(({ name, perplexity }, at) => html`
          <line key=${name} class="reference" stroke-dasharray=${DASHES[at % DASHES.length]} style=${{ "--series": series(at) }}
            x1=${left} x2=${right} y1=${y(perplexity)} y2=${y(perplexity)} />
        `)}
        ${here !== null && here >= points[0].weight && here <= points[points.length - 1].weight &&
        html`<line class="here" x1=${x(here)} x2=${x(here)} y1=${top} y2=${bottom} />
          <text class="label middle" x=${x(here)} y=${top - 6}>slider ${here}</text>`}
        <polyline class="curve" points=${points.map(({ weight, perplexity }) => `${x(weight)},${y(perplexity)}`).join(" ")} />
        <circle class="best" cx=${x(best.weight)} cy=${y(best.perplexity)} r="5" />
        <text class="label middle" x=${x(best.weight)} y=${y(best.perplexity) - 11}>best ${best.weight}</text>
        ${read !== null && html`
          <line class="read" x1=${x(marked.weight)} x2=${x(marked.weight)} y1=${top} y2=${bottom} />
          <circle class="read" cx=${x(marked.weight)} cy=${y(marked.perplexity)} r="4" />
        `}
      </svg>
      <figcaption>
        <p class="reading" aria-hidden="true">${said}</p>
        <ul class="legend">
          ${references.map(({ name, perplexity }, at) => html`
            <li key=${name}>
              <svg width="30" height="10" aria-hidden="true">
                <line class="reference" x1="0" x2="30" y1="5" y2="5" stroke-dasharray=${DASHES[at % DASHES.length]}
                  style=${{ "--series": series(at) }} />
              </svg>
              ${name} <b>${short(perplexity)}</b>
            </li>
          `)}
        </ul>
      </figcaption>
    </figure>
  `;
}

/** @param {number} at  Of a reference. @returns {string} */
const series = (at) => (at < 2 ? "var(--soft)" : `var(--series-${2 + ((at - 2) % 3)})`);
