// One output pane: mirrors a TextBuffer into text nodes, and stays at the end unless the person scrolled up.
import { html, useEffect, useLayoutEffect, useRef } from "./vendor/preact.js";
import { count } from "./format.js";

/** Closer to the end than this counts as "at the end": a line and a bit. */
const END_SLACK_PX = 28;

function mirror(pre, chunks, shown) {
  const firstId = chunks[0]?.id ?? Infinity;
  while (shown.length && shown[0].id < firstId) {
    shown.shift().node.remove();
  }
  chunks.forEach((chunk, i) => {
    const view = shown[i];
    if (!view) {
      const node = document.createTextNode(chunk.text);
      pre.append(node);
      shown.push({ id: chunk.id, node });
    } else if (view.node.length !== chunk.text.length) {
      view.node.appendData(chunk.text.slice(view.node.length));
    }
  });
}

export function OutputPane({ name, buffer, placeholder }) {
  const pre = useRef(null);
  const shown = useRef([]);
  const atEnd = useRef(true);
  buffer.version.value;

  // Another record: start from an empty pane.
  useLayoutEffect(() => {
    pre.current.replaceChildren();
    shown.current = [];
    atEnd.current = true;
  }, [buffer]);

  useLayoutEffect(() => {
    mirror(pre.current, buffer.chunks, shown.current);
    if (atEnd.current) pre.current.scrollTop = pre.current.scrollHeight;
  });

  useEffect(() => {
    const element = pre.current;
    const onScroll = () => {
      atEnd.current = element.scrollHeight - element.scrollTop - element.clientHeight < END_SLACK_PX;
    };
    element.addEventListener("scroll", onScroll, { passive: true });
    return () => element.removeEventListener("scroll", onScroll);
  }, []);

  const note = buffer.droppedChars
    ? `first ${count(buffer.droppedLines, "line")} (${count(buffer.droppedChars, "character")}) not shown here` : "";
  return html`
    <section class=${`output ${name}`} aria-label=${name}>
      <header>
        <h3>${name}</h3>
        <span class="muted" data-testid=${`${name}-note`}>${note}</span>
      </header>
      <div class="output-body">
        <pre ref=${pre} tabindex="0" data-testid=${name}></pre>
        ${buffer.empty && html`<p class="output-empty muted">${placeholder}</p>`}
      </div>
    </section>
  `;
}
