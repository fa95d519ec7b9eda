/** The sliders' mix made the default mix: what changes is shown first; undo and redo. */

import { ApiError, ask } from "./api.js";
import { takeIn } from "./connection.js";
import { current, moved } from "./history.js";
import { changes, formatMix, mixToJson, sameMix } from "./mix.js";
import { Problem } from "./panel.js";
import { defaultState, say } from "./state.js";
import { useStore } from "./store.js";
import { html, useEffect, useRef, useState } from "./vendor/htm-preact.js";

/**
 * @typedef {import("./state.js").Store} Store
 * @typedef {import("./history.js").State} State
 * @typedef {import("./mix.js").Mix} Mix
 */

/** @param {{store: Store}} props */
export function DefaultMix({ store }) {
  const mine = useStore(store, (state) => state.mine);
  const history = useStore(store, (state) => state.history);
  const [asked, setAsked] = useState(/** @type {State | null} */ (null));
  const [problem, setProblem] = useState("");
  const served = current(history);

  /** @param {-1 | 1} step */
  const move = async (step) => {
    const { history } = store.get();
    if (history.moving !== null) return; // Pressed again before the answer: one step at a time.
    const going = moved(history, step);
    if (going === null || going.moving === null) return;
    const { mix } = going.states[going.moving];
    store.set({ history: going });
    setProblem(await change(store, mix, /** @type {State} */ (current(going))));
  };
  return html`
    <div class="actions">
      <button type="button" class="main" disabled=${served === null || sameMix(mine, served.mix)}
        onClick=${() => (setProblem(""), setAsked(served))}>
        Make it the default mix
      </button>
      <button type="button" disabled=${moved(history, -1) === null} onClick=${() => move(-1)}>Undo</button>
      <button type="button" disabled=${moved(history, 1) === null} onClick=${() => move(1)}>Redo</button>
    </div>
    ${problem && html`<${Problem}>${problem}<//>`}
    ${asked && html`<${Confirm} store=${store} asked=${asked} mix=${mine} onClose=${() => setAsked(null)} />`}
  `;
}

/**
 * Ask whether the default mix shall change as it is shown.
 * @param {{store: Store, asked: State, mix: Mix, onClose: () => void}} props  `asked`: the default
 *     mix that was there when the question was asked.
 */
function Confirm({ store, asked, mix, onClose }) {
  const served = useStore(store, defaultState) ?? asked;
  const [seen, setSeen] = useState(asked);
  const [problem, setProblem] = useState("");
  const [setting, setSetting] = useState(false); // The stream tells of it, too, often before the answer.
  const dialog = useRef(/** @type {HTMLDialogElement | null} */ (null));
  useEffect(() => dialog.current?.showModal(), []);
  const close = () => dialog.current?.close(); // The browser gives the focus back where it was.
  const set = async () => {
    if (setting) return;
    setSetting(true);
    const problem = await change(store, mix, seen);
    if (problem === "") return close();
    setSetting(false);
    setProblem(problem);
  };
  return html`
    <dialog ref=${dialog} aria-labelledby="confirm-title" onClose=${onClose}>
      <h3 id="confirm-title">Change the default mix</h3>
      <p>Requests that name no mix get it from then on. Running ones keep theirs.</p>
      <table>
        <thead><tr><th>domain</th><th>now</th><th>then</th></tr></thead>
        <tbody>
          ${changes(seen.mix, mix).map(
            ({ domain, before, after }) => html`
              <tr key=${domain}><th scope="row">${domain}</th><td>${before || "absent"}</td><td>${after || "absent"}</td></tr>
            `,
          )}
        </tbody>
      </table>
      <p class="before-after"><code>${formatMix(seen.mix)}</code> → <code>${formatMix(mix)}</code></p>
      ${!setting && served.generation !== seen.generation &&
      html`<${Problem}>
        Somebody else has changed it meanwhile, to ${formatMix(served.mix)} (generation ${served.generation}).
        <button type="button" onClick=${() => (setProblem(""), setSeen(served))}>Compare with that</button>
      <//>`}
      ${problem && html`<${Problem}>${problem}<//>`}
      <div class="actions">
        <button type="button" class="main" onClick=${set}>Set it</button>
        <button type="button" onClick=${close}>Cancel</button>
      </div>
    </dialog>
  `;
}

/**
 * Make `mix` the default mix if that is still `seen`; return one line if it did not become it.
 * @param {Store} store @param {Mix} mix @param {State} seen @returns {Promise<string>}
 */
async function change(store, mix, seen) {
  try {
    const answer = await ask("PUT", "v1/mix", { mix: mixToJson(mix) }, { ifMatch: seen.generation });
    takeIn(store, answer.mix);
    say(store, `The default mix is ${formatMix(mix)} now, generation ${answer.mix.generation}.`);
    return "";
  } catch (error) {
    const { history } = store.get();
    store.set({ history: { ...history, moving: null } });
    if (!(error instanceof ApiError) || error.status !== 412) return /** @type {Error} */ (error).message;
    try {
      takeIn(store, (await ask("GET", "v1/mix")).mix);
    } catch {
      // The stream of changes will tell it.
    }
    const now = defaultState(store.get());
    return `Nothing was changed: somebody else was first. The default mix is ${now && formatMix(now.mix)} now.`;
  }
}
