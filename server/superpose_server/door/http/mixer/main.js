/** Begins the page: one state, kept in step with the server, shown by one component. */

import { App } from "./app.js";
import { follow } from "./connection.js";
import { INITIAL } from "./state.js";
import { createStore } from "./store.js";
import { html, render } from "./vendor/htm-preact.js";

const store = createStore(INITIAL);
document.body.replaceChildren();
render(html`<${App} store=${store} />`, document.body);
follow(store);
