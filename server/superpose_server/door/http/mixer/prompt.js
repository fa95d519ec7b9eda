/** What to generate from, and how. */

import { QUESTIONS, asPrompt } from "./examples.js";
import { NumberField } from "./number_field.js";
import { useStore } from "./store.js";
import { html } from "./vendor/htm-preact.js";

/**
 * @typedef {import("./state.js").Store} Store
 * @typedef {import("./state.js").Prompt} Prompt
 */

/** @param {{store: Store, onGo: () => void}} props  `onGo`: Ctrl+Enter was pressed. */
export function Prompting({ store, onGo }) {
  const prompt = useStore(store, (state) => state.prompt);
  const chats = useStore(store, (state) => state.server?.chat_template === true);
  const longest = useStore(store, (state) => state.server?.context_length ?? 1);
  const set = (/** @type {Partial<Prompt>} */ change) => {
    store.set({ prompt: { ...store.get().prompt, ...change } });
  };
  return html`
    <label class="small" for="prompt">Prompt</label>
    <textarea id="prompt" rows="4" spellcheck=${false} value=${prompt.text}
      placeholder="Question: …"
      onInput=${(/** @type {any} */ event) => set({ text: event.currentTarget.value })}
      onKeyDown=${(/** @type {KeyboardEvent} */ event) =>
        event.key === "Enter" && (event.ctrlKey || event.metaKey) && onGo()}></textarea>
    <${Examples} store=${store} onPick=${(/** @type {string} */ question) =>
      set({ text: prompt.chat ? question : asPrompt(question) })} />
    <div class="options">
      ${chats &&
      html`<label class="switch">
        <input type="checkbox" role="switch" checked=${prompt.chat}
          onChange=${(/** @type {any} */ event) => set({ chat: event.currentTarget.checked })} />
        As a conversation
      </label>`}
      <${NumberField} name="Max tokens" value=${prompt.maxTokens} min=${1} max=${longest} step=${1} required
        onValue=${(/** @type {string} */ typed) => set({ maxTokens: Number(typed) })} />
      <${NumberField} name="Temperature" value=${prompt.temperature} min=${0} max=${2} step="any" required
        onValue=${(/** @type {string} */ typed) => set({ temperature: Number(typed) })} />
      <${NumberField} name="Seed" value=${prompt.seed} min=${0} max=${Number.MAX_SAFE_INTEGER} step=${1} required
        onValue=${(/** @type {string} */ typed) => set({ seed: Number(typed) })} />
    </div>
  `;
}

/** @param {{store: Store, onPick: (question: string) => void}} props */
function Examples({ store, onPick }) {
  const adapters = useStore(store, (state) => state.adapters);
  const loaded = [...QUESTIONS].filter(([name]) => adapters.some(({ domain }) => domain === name));
  if (loaded.length === 0) return null;
  return html`
    <div class="chips" role="group" aria-label="Example prompts">
      ${loaded.map(
        ([domain, question]) => html`
          <button type="button" class="chip" key=${domain} title=${question} onClick=${() => onPick(question)}>
            a ${domain} question
          </button>
        `,
      )}
    </div>
  `;
}
