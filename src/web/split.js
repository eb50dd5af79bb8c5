// A list, and beside it the one that the address names.
import { html } from "./vendor/preact.js";
import { href } from "./router.js";
import { Empty, ProblemNote } from "./ui.js";

/**
 * `loaded` is of useLoaded, `row(one)` what stands in the list, `detail(one)` beside it, `above` over the list.
 * `none`, `gone` and `unchosen` say what it means when there is nothing to show.
 */
export function Split({ tab, noun, id, items, idOf, loaded, above, row, detail, none, gone, unchosen }) {
  const { loading, problem, reload } = loaded;
  const chosen = items.find((one) => idOf(one) === id);
  return html`
    <div class=${`split ${id ? "has-detail" : ""}`}>
      <div class="split-list">
        <${ProblemNote} problem=${problem} retry=${reload} />
        ${above}
        ${loading && html`<p class="muted pad">Loading…</p>`}
        ${!loading && !problem && !items.length && none}
        <ul class="rows" data-testid=${tab}>
          ${items.map((one) => html`
            <li key=${idOf(one)}>
              <a class="row" href=${href(tab, idOf(one))} aria-current=${idOf(one) === id ? "true" : undefined}>${row(one)}</a>
            </li>`)}
        </ul>
      </div>
      <div class="split-detail">
        ${id && html`<a class="back" href=${href(tab)}>← All ${tab}</a>`}
        ${chosen && detail(chosen)}
        ${id && !chosen && !loading && !problem && html`<${Empty} title=${`No such ${noun}`}>${gone}<//>`}
        ${!id && html`<${Empty} title=${`No ${noun} chosen`}>${unchosen}<//>`}
      </div>
    </div>
  `;
}
