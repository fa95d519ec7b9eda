/**
 * What stands below mix, prompt and texts: each a module of its own, mounted by its line here.
 *
 * A section is a component that gets `{ store }` and renders one `Foldout` (`panel.js`).
 * - It reads with `useStore(store, (state) => state.mine)`; `state.js` says what there is.
 * - It moves the sliders with `setMine(store, mix)`, and never changes the default mix by itself.
 * - It asks the server through `api.js` alone: `ask` for JSON, `events` for streams, with a `signal`
 *   that ends the call when it is closed or asked anew. An `ApiError`'s message is one line to show.
 * - It costs the engine nothing unless it is open and somebody has acted.
 * - All text is a text node. What has happened is said with `say(store, ...)`, not token by token.
 * - Its styles stand in `sections.css`, under a class of its own name, in the colours of `mixer.css`.
 */

import { CurveSection } from "./curve.js";
import { FitSection } from "./fit.js";
import { InterferenceSection } from "./interference.js";

/** @type {readonly any[]} */
export const SECTIONS = [InterferenceSection, CurveSection, FitSection];
