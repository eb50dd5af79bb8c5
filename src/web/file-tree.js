// The files of a repl as a tree: chosen by mouse or keyboard, made, renamed, removed, brought in and taken out.
import { html, useMemo, useRef, useState } from "./vendor/preact.js";
import { Problem } from "./api.js";
import { MAX_FILE_BYTES } from "./runner.js";
import { asked, confirmed } from "./ui.js";
import { bytes, count } from "./format.js";

/** Shown of one folder: more cannot be read, and a terminal finds the rest. */
const MOST_IN_FOLDER = 500;

const nameOf = (path) => path.slice(path.lastIndexOf("/") + 1);
const folderOf = (path) => (path.includes("/") ? path.slice(0, path.lastIndexOf("/")) : "");
const within = (folder, name) => (folder ? `${folder}/${name}` : name);

/** By folder: what is in it, folders first. */
function byFolder(entries) {
  const folders = new Map([["", []]]);
  for (const entry of entries) {
    const folder = folderOf(entry.path);
    if (!folders.has(folder)) folders.set(folder, []);
    folders.get(folder).push(entry);
  }
  const order = (entry) => (entry.kind === "folder" ? 0 : 1);
  for (const list of folders.values()) {
    list.sort((a, b) => order(a) - order(b) || nameOf(a.path).localeCompare(nameOf(b.path), "en", { numeric: true }));
  }
  return folders;
}

/** The rows that show, from the top: `{entry, level, open}` or `{more, level}`. */
function rowsOf(folders, open, folder = "", level = 1) {
  const inside = folders.get(folder) ?? [];
  const rows = inside.slice(0, MOST_IN_FOLDER).flatMap((entry) => {
    const isOpen = entry.kind === "folder" && open.has(entry.path);
    return [{ entry, level, open: isOpen }, ...(isOpen ? rowsOf(folders, open, entry.path, level + 1) : [])];
  });
  return inside.length > MOST_IN_FOLDER ? [...rows, { more: inside.length - MOST_IN_FOLDER, folder, level }] : rows;
}

const ICONS = {
  file: "M5 2.5h6l4 4v11H5z M11 2.5v4h4",
  folder: "M2.5 5h5l2 2h8v9h-15z",
  newFile: "M4.5 2.5h6l4 4V9 M4.5 2.5v15H10 M14.5 12v6 M11.5 15h6",
  newFolder: "M2.5 5h5l2 2h8v3 M2.5 5v11H10 M14.5 12v6 M11.5 15h6",
  upload: "M10 13V3 M6 7l4-4 4 4 M3 13v4h14v-4",
  rename: "M4 16l1-4 8-8 3 3-8 8z M11.5 5.5l3 3",
  remove: "M4 5.5h12 M8 5.5V3h4v2.5 M5.5 5.5l.8 12h7.4l.8-12",
  download: "M10 3v10 M6 9l4 4 4-4 M3 13v4h14v-4",
};

export function Icon({ name }) {
  return html`<svg viewBox="0 0 20 20" width="16" height="16" fill="none" stroke="currentColor" stroke-width="1.5"
    stroke-linejoin="round" stroke-linecap="round" aria-hidden="true"><path d=${ICONS[name]} /></svg>`;
}

function Tool({ icon, label, disabled, onClick, testId }) {
  return html`<button type="button" class="icon" aria-label=${label} title=${label} disabled=${disabled} data-testid=${testId}
    onClick=${onClick}><${Icon} name=${icon} /></button>`;
}

function useActions({ runner, openFiles, chosen, choose, fail, setUploading }) {
  const entry = (path) => runner.files.peek()?.find((one) => one.path === path);
  /** Where something new goes: into the chosen folder, or beside the chosen file. */
  const here = () => {
    if (!chosen) return "";
    return entry(chosen)?.kind === "folder" ? chosen : folderOf(chosen);
  };
  const doing = async (what, body) => {
    try {
      await body();
      fail(null);
    } catch (problem) {
      fail(new Problem({ title: what, cause: problem.reason ?? problem.message, remediation: problem.remediation }));
    }
  };
  const askName = (title, action, value) => asked({ title, label: "Name, with folders before it if you like", value, action });

  const upload = (files, folder) => doing("Not everything was uploaded", async () => {
    for (const file of files) {
      const path = within(folder, file.name);
      if (file.size > MAX_FILE_BYTES) throw new Problem({ title: `${file.name} is too large`, cause: `It has ${bytes(file.size)}, and ${bytes(MAX_FILE_BYTES)} are the most.` });
      if (entry(path) && !(await confirmed({ title: `Replace ${path}?`, detail: "A file of this name is there already. What it holds is lost.", action: "Replace it" }))) continue;
      setUploading({ path, share: 0 });
      const content = new Uint8Array(await file.arrayBuffer());
      await runner.write(path, content, (done) => setUploading({ path, share: content.length ? done / content.length : 1 }));
      choose(path);
    }
  }).finally(() => setUploading(null));

  return {
    upload, here,
    newFile: async () => {
      const folder = here();
      const path = await askName("New file", "Make it", folder ? `${folder}/` : "");
      if (!path) return;
      await doing(`${path} was not made`, async () => {
        if (entry(path)) throw new Problem({ title: "exists", cause: "Something of this name is there already.", remediation: "Choose another name." });
        await runner.write(path, new Uint8Array());
        await runner.loadFiles();
        choose(path);
        await openFiles.open(path);
      });
    },
    newFolder: async () => {
      const folder = here();
      const path = await askName("New folder", "Make it", folder ? `${folder}/` : "");
      if (path) await doing(`${path} was not made`, async () => {
        await runner.ask("files.make", { path });
        choose(path);
      });
    },
    rename: async () => {
      const to = await askName(`Rename ${nameOf(chosen)}`, "Rename it", chosen);
      if (!to || to === chosen) return;
      await doing(`${chosen} was not renamed`, async () => {
        await runner.ask("files.rename", { path: chosen, to });
        openFiles.renamed(chosen, to);
        choose(to);
      });
    },
    remove: async () => {
      const folder = entry(chosen)?.kind === "folder";
      const inside = folder ? runner.files.peek().filter((one) => one.path.startsWith(`${chosen}/`)).length : 0;
      const yes = await confirmed({
        title: `Delete ${chosen}?`,
        detail: inside ? `With it goes what is in it: ${count(inside, "file or folder", "files and folders")}. It cannot be brought back.` : "It cannot be brought back.",
        action: "Delete it",
      });
      if (yes) await doing(`${chosen} was not deleted`, async () => {
        await runner.ask("files.delete", { path: chosen });
        openFiles.removed(chosen);
        choose(null);
      });
    },
    download: () => doing(`${chosen} was not downloaded`, async () => {
      const url = URL.createObjectURL(new Blob([await runner.read(chosen)]));
      Object.assign(document.createElement("a"), { href: url, download: nameOf(chosen) }).click();
      // The browser has taken it up by then.
      setTimeout(() => URL.revokeObjectURL(url), 1_000);
    }),
  };
}

function about(entry) {
  if (entry.unkept) return `${entry.path} is not kept when the repl stops: ${entry.unkept}`;
  if (entry.made) return `${entry.path}: packages or a cache, which are not shown`;
  if (entry.kind === "folder") return entry.path;
  if (entry.kind === "file") return `${entry.path} · ${bytes(entry.size)}`;
  if (entry.link !== undefined) return `${entry.path}: a link to ${entry.link}`;
  return `${entry.path}: neither a file nor a folder; it is not opened`;
}

function Row({ row, chosen, shown, dirty, focusable, act }) {
  const { entry, level, open } = row;
  const isFolder = entry.kind === "folder";
  return html`
    <li role="treeitem" aria-level=${level} aria-selected=${chosen === entry.path ? "true" : "false"} aria-expanded=${isFolder ? String(open) : undefined}
      aria-label=${nameOf(entry.path) + (dirty ? ", not saved" : "") + (entry.unkept ? ", not kept" : "")} tabindex=${focusable ? "0" : "-1"} data-path=${entry.path}
      class=${`tree-row ${entry.made ? "made" : entry.kind} ${shown === entry.path ? "shown" : ""}`} style=${{ paddingLeft: `${level * 14 - 4}px` }}
      title=${about(entry)}
      onFocus=${() => act.choose(entry.path)} onClick=${() => act.pick(entry)}>
      <span class="tree-arrow" aria-hidden="true">${isFolder && !entry.made ? (open ? "▾" : "▸") : ""}</span>
      <${Icon} name=${isFolder ? "folder" : "file"} />
      <span class="tree-name">${nameOf(entry.path)}</span>
      ${dirty && html`<span class="unsaved" title="Not saved">●</span>`}
      ${entry.unkept && html`<span class="unkept" aria-hidden="true" data-testid="unkept">not kept</span>`}
    </li>
  `;
}

/** Moves the focus and opens folders as trees do everywhere. */
function keys({ event, rows, at, act, actions, readOnly }) {
  const { entry, open } = rows[at];
  const move = (to) => to >= 0 && to < rows.length && act.focus(rows[to].entry.path);
  const doings = {
    ArrowDown: () => move(at + 1),
    ArrowUp: () => move(at - 1),
    Home: () => move(0),
    End: () => move(rows.length - 1),
    ArrowRight: () => entry.kind === "folder" && (open ? move(at + 1) : act.toggle(entry.path)),
    ArrowLeft: () => (open ? act.toggle(entry.path) : move(rows.findIndex((row) => row.entry.path === folderOf(entry.path)))),
    Enter: () => act.pick(entry),
    " ": () => act.pick(entry),
    ...(readOnly ? {} : { F2: actions.rename, Delete: actions.remove }),
  };
  const doing = doings[event.key];
  if (!doing || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  doing();
}

export function FileTree({ runner, openFiles, readOnly, fail }) {
  const [open, setOpen] = useState(() => new Set());
  const [chosen, setChosen] = useState(null);
  const [uploading, setUploading] = useState(null);
  const [dropping, setDropping] = useState(false);
  const list = useRef(null);
  const picker = useRef(null);
  const entries = runner.files.value ?? [];
  const folders = useMemo(() => byFolder(entries), [entries]);
  const all = rowsOf(folders, open);
  const rows = all.filter((row) => row.entry);
  const dirty = new Set(openFiles.dirty.value.map((file) => file.path));
  const at = Math.max(0, rows.findIndex((row) => row.entry.path === chosen));
  const isThere = entries.some((entry) => entry.path === chosen);

  const toggle = (path) => setOpen((before) => {
    const after = new Set(before);
    if (!after.delete(path)) after.add(path);
    return after;
  });
  /** Also opens the folders it is in. */
  const choose = (path) => {
    setChosen(path);
    if (path) setOpen((before) => new Set([...before, ...path.split("/").slice(0, -1).map((_, i, parts) => parts.slice(0, i + 1).join("/"))]));
  };
  const actions = useActions({ runner, openFiles, chosen: isThere ? chosen : null, choose, fail, setUploading });
  const act = {
    toggle,
    choose: setChosen,
    focus: (path) => {
      list.current?.querySelector(`[data-path="${CSS.escape(path)}"]`)?.focus();
    },
    pick: (entry) => {
      setChosen(entry.path);
      if (entry.kind === "folder") toggle(entry.path);
      else if (entry.kind === "file") openFiles.open(entry.path).then(() => fail(null), fail);
    },
  };
  const chosenFile = isThere && entries.find((entry) => entry.path === chosen).kind === "file";
  const drop = (event) => {
    event.preventDefault();
    setDropping(false);
    const target = event.target.closest("[data-path]")?.dataset.path;
    const kind = entries.find((entry) => entry.path === target)?.kind;
    actions.upload([...event.dataTransfer.files], !target ? "" : kind === "folder" ? target : folderOf(target));
  };

  return html`
    <section class=${`files ${dropping ? "dropping" : ""}`} aria-label="Files" data-part="files"
      onDragOver=${(event) => { if (!readOnly && event.dataTransfer.types.includes("Files")) { event.preventDefault(); setDropping(true); } }}
      onDragLeave=${() => setDropping(false)} onDrop=${readOnly ? undefined : drop}>
      <header class="part-head">
        <h3>Files</h3>
        <span class="tools">
          ${!readOnly && html`
            <${Tool} icon="newFile" label="New file" onClick=${actions.newFile} testId="new-file" />
            <${Tool} icon="newFolder" label="New folder" onClick=${actions.newFolder} testId="new-folder" />
            <${Tool} icon="upload" label="Upload files" onClick=${() => picker.current.click()} testId="upload" />
            <${Tool} icon="rename" label=${isThere ? `Rename ${nameOf(chosen)}` : "Rename"} disabled=${!isThere} onClick=${actions.rename} testId="rename" />
            <${Tool} icon="remove" label=${isThere ? `Delete ${nameOf(chosen)}` : "Delete"} disabled=${!isThere} onClick=${actions.remove} testId="delete" />`}
          <${Tool} icon="download" label=${chosenFile ? `Download ${nameOf(chosen)}` : "Download"} disabled=${!chosenFile} onClick=${actions.download} testId="download" />
        </span>
        <input type="file" multiple hidden ref=${picker} data-testid="upload-files" aria-label="Files to upload"
          onChange=${(event) => { actions.upload([...event.currentTarget.files], actions.here()); event.currentTarget.value = ""; }} />
      </header>
      ${uploading && html`<p class="uploading" role="status"><span class="mono">${uploading.path}</span><progress max="1" value=${uploading.share} aria-label=${`Uploading ${uploading.path}`}></progress></p>`}
      ${runner.files.value && !entries.length && html`<p class="muted pad small-text">No files yet. Make one, or drop some here.</p>`}
      <ul role="tree" aria-label="Files" ref=${list} class="tree" data-testid="tree"
        onKeyDown=${(event) => rows.length && keys({ event, rows, at, act, actions, readOnly })}>
        ${all.map((row) => row.entry
          ? html`<${Row} key=${row.entry.path} row=${row} chosen=${chosen} shown=${openFiles.shown.value} dirty=${dirty.has(row.entry.path)}
              focusable=${rows[at] === row} act=${act} />`
          : html`<li key=${`${row.folder}/…`} role="none" class="tree-row muted" style=${{ paddingLeft: `${row.level * 14 + 16}px` }}>and ${count(row.more, "more", "more")}</li>`)}
      </ul>
    </section>
  `;
}
