/** Two or three texts of one prompt side by side, each under its mix, streaming at once. */

import { pieces, sharedBy } from "./difference.js";
import { write } from "./generation.js";
import { BASE, formatMix, mixOf } from "./mix.js";
import { Problem } from "./panel.js";
import { Prompting } from "./prompt.js";
import { defaultState, say } from "./state.js";
import { useStore } from "./store.js";
import { html, useMemo, useState } from "./vendor/htm-preact.js";

/**
 * @typedef {import("./state.js").Store} Store
 * @typedef {import("./state.js").State} State
 * @typedef {import("./mix.js").Mix} Mix
 *
 * @typedef {object} Column  A text, or the place for one.
 * @property {string} choice  Which mix: "base", "default", "mine", "domain NAME" or "named NAME".
 * @property {string} under  The mix that its text was made with, as text; "" before there is one.
 * @property {import("./generation.js").Written | null} written
 * @property {string} problem
 */

/** @param {string} choice @returns {Column} */
const column = (choice) => ({ choice, under: "", written: null, problem: "" });

/** @param {{store: Store}} props */
export function Texts({ store }) {
  const [columns, setColumns] = useState(["base", "default", "mine"].map(column));
  const [running, setRunning] = useState(/** @type {AbortController | null} */ (null));
  const empty = useStore(store, (state) => state.prompt.text === "");
  const change = (/** @type {number} */ index, /** @type {Partial<Column>} */ changed) =>
    setColumns((/** @type {Column[]} */ all) =>
      all.map((each, i) => (i === index ? { ...each, ...changed } : each)),
    );
  const run = async () => {
    const ending = new AbortController();
    setRunning(ending);
    say(store, `Writing ${columns.length} texts.`);
    const state = store.get();
    await Promise.all(
      columns.map(async ({ choice }, index) => {
        change(index, column(choice));
        try {
          const mix = chosenMix(state, choice);
          change(index, { under: formatMix(mix) });
          for await (const written of write(state.prompt, mix, ending.signal)) change(index, { written });
        } catch (error) {
          if (!ending.signal.aborted) change(index, { problem: /** @type {Error} */ (error).message });
        }
      }),
    );
    setRunning(null);
    say(store, ending.signal.aborted ? "Stopped." : "The texts are written.");
  };
  const { marks, compared } = useMarks(columns, running !== null);
  const ready = running === null && !empty;
  return html`
    <${Prompting} store=${store} onGo=${() => ready && run()} />
    <div class="actions">
      <button type="button" class="main" disabled=${!ready} title="Ctrl+Enter in the prompt" onClick=${run}>
        Write ${columns.length} texts
      </button>
      <button type="button" disabled=${running === null} onClick=${() => running?.abort()}>Stop</button>
      <button type="button" class="quiet" disabled=${running !== null}
        onClick=${() => setColumns(columns.length < 3 ? [...columns, column("base")] : columns.slice(0, -1))}>
        ${columns.length < 3 ? "Three columns" : "Two columns"}
      </button>
    </div>
    <div class="columns of-${columns.length}">
      ${columns.map(
        (/** @type {Column} */ each, /** @type {number} */ index) => html`
          <${Text} key=${index} store=${store} column=${each} number=${index + 1} marks=${marks[index]}
            running=${running !== null} onChoice=${(/** @type {string} */ choice) => change(index, column(choice))} />
        `,
      )}
    </div>
    ${marks.flat().some((mark) => mark !== "") &&
    html`<p class="hint">
      Marked words stand in no other text${columns.length > 2 ? ", underlined ones not in all of them" : ""}.
    </p>`}
    ${!compared && html`<p class="hint">Texts of more than ${MOST_WORDS} words are not compared.</p>`}
  `;
}

/** @typedef {"" | "rare" | "alone"} Mark  A word that all texts have, not all, or no other. */

const MOST_WORDS = 4000; // of a text; what it takes to compare two grows with the product of theirs

/**
 * Return for each text how its words are marked, and whether they were compared or were too long
 * for it: once all are written, since until then every word that another text has not reached yet
 * would differ. A text without words is none to compare with.
 * @param {readonly Column[]} columns @param {boolean} running
 * @returns {{marks: Mark[][], compared: boolean}}
 */
function useMarks(columns, running) {
  const texts = columns.map(({ written }) => written?.text ?? "");
  return useMemo(() => {
    const words = running ? [] : texts.map((text) => text.match(/\S+/g) ?? []);
    if (words.some((each) => each.length > MOST_WORDS)) return { marks: texts.map(() => []), compared: false };
    const some = words.filter((each) => each.length > 0);
    const counts = sharedBy(some);
    /** @param {number} count @returns {Mark} */
    const mark = (count) => (count === some.length - 1 ? "" : count === 0 ? "alone" : "rare");
    return { marks: texts.map((_, index) => (counts[some.indexOf(words[index])] ?? []).map(mark)), compared: true };
  }, [running, ...texts, texts.length]);
}

/**
 * @param {{store: Store, column: Column, number: number, marks: Mark[], running: boolean,
 *          onChoice: (choice: string) => void}} props
 */
function Text({ store, column, number, marks, running, onChoice }) {
  const adapters = useStore(store, (state) => state.adapters);
  const named = useStore(store, (state) => state.named);
  const { choice, under, written, problem } = column;
  const text = written?.text ?? "";
  let word = -1;
  return html`
    <article aria-label="Text ${number}">
      <label class="visually-hidden" for="choice-${number}">Mix of text ${number}</label>
      <select id="choice-${number}" value=${choice} disabled=${running}
        onChange=${(/** @type {any} */ event) => onChoice(event.currentTarget.value)}>
        <option value="base">base</option>
        <option value="default">default mix</option>
        <option value="mine">the sliders' mix</option>
        ${named.size > 0 &&
        html`<optgroup label="Named mixes">
          ${[...named.keys()].map((name) => html`<option key=${name} value="named ${name}">${name}</option>`)}
        </optgroup>`}
        ${adapters.length > 0 &&
        html`<optgroup label="A domain alone">
          ${adapters.map(({ domain }) => html`<option key=${domain} value="domain ${domain}">${domain}</option>`)}
        </optgroup>`}
      </select>
      <p class="under">${under ? html`<code>${under}</code>` : " "}</p>
      <div role="group" class="text ${running && written?.finish === null ? "growing" : ""}" tabindex="0"
        aria-label="What text ${number} says">
        ${marks.every((mark) => mark === "")
          ? text
          : pieces(text).map((piece) => {
              const mark = piece.word && marks[++word];
              return mark ? html`<mark class=${mark}>${piece.text}</mark>` : piece.text;
            })}
      </div>
      <p class="figures">${written && figures(written, running)}</p>
      ${problem && html`<${Problem}>${problem}<//>`}
    </article>
  `;
}

/**
 * Return the mix that a choice means now.
 * @param {State} state @param {string} choice @returns {Mix}
 * @throws {Error}  One line: it means none.
 */
function chosenMix(state, choice) {
  const [kind, name] = choice.split(" ");
  switch (kind) {
    case "base":
      return BASE;
    case "default":
      return known(defaultState(state)?.mix, "the server has not told its default mix yet");
    case "mine":
      return state.mine;
    case "named":
      return known(state.named.get(name), `${name} names no mix any more: choose another`);
    default:
      return mixOf([[name, 1]]);
  }
}

/** @param {Mix | undefined} mix @param {string} otherwise @returns {Mix} */
function known(mix, otherwise) {
  if (mix === undefined) throw new Error(otherwise);
  return mix;
}

const ENDS = new Map([
  ["stop", "ended"],
  ["length", "max tokens reached"],
  ["abort", "ended by the server"],
]);

/** @param {import("./generation.js").Written} written @param {boolean} running */
function figures({ tokens, tokensPerSecond, finish }, running) {
  const parts = [`${tokens} ${tokens === 1 ? "token" : "tokens"}`];
  if (tokensPerSecond !== null) parts.push(`${tokensPerSecond.toFixed(tokensPerSecond < 10 ? 1 : 0)} a second`);
  if (finish !== null) parts.push(tokens < 2 && finish === "stop" ? "ended at once" : (ENDS.get(finish) ?? finish));
  else if (!running) parts.push("stopped");
  return parts.join(" · ");
}
