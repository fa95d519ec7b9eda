/** Named mixes: a name for the mix of the sliders, and which names there are. */

import { ask } from "./api.js";
import { loadLists } from "./connection.js";
import { formatMix, mixToJson } from "./mix.js";
import { Problem } from "./panel.js";
import { say } from "./state.js";
import { useStore } from "./store.js";
import { html, useState } from "./vendor/htm-preact.js";

/** @param {{store: import("./state.js").Store}} props */
export function Names({ store }) {
  const named = useStore(store, (state) => state.named);
  const [name, setName] = useState("");
  const [problem, setProblem] = useState("");
  const change = async (/** @type {() => Promise<string>} */ work) => {
    try {
      const done = await work();
      setProblem("");
      say(store, done);
      await loadLists(store);
    } catch (error) {
      setProblem(/** @type {Error} */ (error).message);
    }
  };
  const give = () =>
    change(async () => {
      const mix = store.get().mine;
      await ask("PUT", `v1/mix/names/${encodeURIComponent(name)}`, { mix: mixToJson(mix) });
      setName("");
      return `${name} now stands for ${formatMix(mix)}.`;
    });
  const take = (/** @type {string} */ name) =>
    change(async () => {
      await ask("DELETE", `v1/mix/names/${encodeURIComponent(name)}`);
      return `${name} stands for nothing any more.`;
    });
  return html`
    <form class="naming" onSubmit=${(/** @type {any} */ event) => {
      event.preventDefault();
      give();
    }}>
      <label for="mix-name">Name this mix</label>
      <input id="mix-name" autocomplete="off" spellcheck=${false} value=${name}
        onInput=${(/** @type {any} */ event) => setName(event.currentTarget.value)} />
      <button disabled=${name === ""}>Name it</button>
    </form>
    ${problem && html`<${Problem}>${problem}<//>`}
    ${named.size > 0 &&
    html`<ul class="names" aria-label="Named mixes">
      ${[...named].map(
        ([name, mix]) => html`
          <li key=${name}>
            <b>${name}</b> <code>${formatMix(mix)}</code>
            <button type="button" class="quiet" aria-label="Take the name ${name} away"
              onClick=${() => take(name)}>×</button>
          </li>
        `,
      )}
    </ul>`}
  `;
}
