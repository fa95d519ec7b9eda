/** What may be wider than a phone, or long, and then scrolls by itself, with the keyboard too. */

import { html } from "./vendor/htm-preact.js";

/** @param {{title: string, hint?: string, children?: any}} props */
export function Wide({ title, hint, children }) {
  return html`
    <div class="titled">
      <h3>${title}</h3>
      ${hint && html`<p class="hint">${hint}</p>`}
      <div class="wide" role="region" tabindex="0" aria-label=${title}>${children}</div>
    </div>
  `;
}
