/** The whole page. */

import { CopyAs } from "./copy_as.js";
import { DefaultMix } from "./default_mix.js";
import { Header, Live } from "./live.js";
import { Names } from "./names.js";
import { Panel } from "./panel.js";
import { SECTIONS } from "./sections.js";
import { Sliders } from "./sliders.js";
import { Unlock } from "./unlock.js";
import { useStore } from "./store.js";
import { Texts } from "./texts.js";
import { html } from "./vendor/htm-preact.js";

/** @param {{store: import("./state.js").Store}} props */
export function App({ store }) {
  return html`
    <${Header} store=${store} />
    <${Unlock} store=${store} />
    <${Live} store=${store} />
    <main>
      <${Panel} id="mix" title="Mix" hint="Each weight scales a domain's delta; 0 leaves it out.">
        <${Sliders} store=${store} />
        <${Names} store=${store} />
        <${DefaultMix} store=${store} />
      <//>
      <div class="beside">
        <${Panel} id="texts" title="Texts">
          <${Texts} store=${store} />
          <${CopyAs} store=${store} />
        <//>
        ${SECTIONS.map((Section) => html`<${Section} key=${Section.name} store=${store} />`)}
      </div>
    </main>
    <${Said} store=${store} />
  `;
}

/** What has just happened. @param {{store: import("./state.js").Store}} props */
function Said({ store }) {
  const said = useStore(store, (state) => state.said);
  return html`<p class="said" role="status">${said}</p>`;
}
