/** Asks for a token, where the server does not answer without. */

import { unlock } from "./connection.js";
import { Panel, Problem } from "./panel.js";
import { useStore } from "./store.js";
import { html, useState } from "./vendor/htm-preact.js";

/** @param {{store: import("./state.js").Store}} props */
export function Unlock({ store }) {
  const refusal = useStore(store, (state) => state.refusal);
  const [token, setToken] = useState("");
  if (refusal === "") return null;
  return html`
    <${Panel} id="unlock" title="Access" hint="Kept for this tab, until it is closed.">
      <${Problem}>${refusal}<//>
      <form class="naming" onSubmit=${(/** @type {any} */ event) => {
        event.preventDefault();
        setToken("");
        unlock(store, token);
      }}>
        <label for="token">Token</label>
        <input id="token" type="password" autocomplete="current-password" spellcheck=${false} value=${token}
          pattern="[!-~]*" title="A token has no spaces, and letters of ASCII only"
          onInput=${(/** @type {any} */ event) => setToken(event.currentTarget.value.trim())} />
        <button disabled=${token === ""}>Use it</button>
      </form>
    <//>
  `;
}
