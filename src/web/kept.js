// Workspaces with something that is not saved stay while another tab is shown, by their repl's name.
export const kept = new Map();

/** Whoever signs in next starts with nothing of what was here. */
export const forgetWorkspaces = () => kept.clear();

/** The files whose text would be lost. */
export const unsavedFiles = () => [...kept.values()].flatMap((inside) => inside.files.dirty.peek().map((file) => file.path));
