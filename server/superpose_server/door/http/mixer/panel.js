/** Frames that everything on the page stands in. */

import { html } from "./vendor/htm-preact.js";

/**
 * A part of the page with a heading.
 * @param {{id: string, title: string, hint?: string, class?: string, children?: any}} props
 */
export function Panel({ id, title, hint, class: name = "", children }) {
  return html`
    <section class="panel ${name}" id=${id} aria-labelledby="${id}-title">
      <h2 id="${id}-title">${title}</h2>
      ${hint && html`<p class="hint">${hint}</p>`}
      ${children}
    </section>
  `;
}

/**
 * A part of the page that is closed at first; its children are made only while it is open.
 * @param {{id: string, title: string, hint?: string, open: boolean, onToggle: (open: boolean) => void,
 *          children?: any}} props
 */
export function Foldout({ id, title, hint, open, onToggle, children }) {
  return html`
    <details class="panel foldout ${id}" id=${id} open=${open}
      onToggle=${(/** @type {any} */ event) => onToggle(event.currentTarget.open)}>
      <summary><h2>${title}</h2>${hint && html`<span class="hint">${hint}</span>`}</summary>
      ${open && html`<div class="inside">${children}</div>`}
    </details>
  `;
}

/** One line that says what went wrong. @param {{children?: any}} props */
export function Problem({ children }) {
  return html`<p class="problem" role="alert">${children}</p>`;
}
