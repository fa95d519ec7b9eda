/** A number with a label. */

import { html, useState } from "./vendor/htm-preact.js";

/**
 * What is being typed stays as it is typed ("0.0" on the way to "0.05"). What is no number within the limits
 * is marked and told to nobody, and gone once the field is left: what stands there then is what counts.
 * @param {{name: string, value: number | string, min: number, max?: number, step: number | "any", required?: boolean,
 *          placeholder?: number | string, onValue: (value: string) => void}} props  `onValue` gets "" for
 *     none, unless a number is `required`.
 */
export function NumberField({ name, value, onValue, ...limits }) {
  const [typed, setTyped] = useState(/** @type {string | null} */ (null));
  return html`
    <label class="field">
      ${name}
      <input type="number" ...${limits} value=${typed ?? value}
        onInput=${(/** @type {any} */ { currentTarget: field }) => {
          setTyped(field.value);
          if (field.validity.valid) onValue(field.value);
        }}
        onBlur=${(/** @type {any} */ { currentTarget: field }) => {
          setTyped(null);
          field.value = value; // What cannot be read as a number reads as "", which would stay.
        }} />
    </label>
  `;
}
