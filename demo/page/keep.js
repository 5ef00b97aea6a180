// Keeps the conversation and its pictures in the browser's IndexedDB, and brings them back when the page is opened again.
const BYTES = 20e6, DAYS = 7;  // larger pictures, and older ones, are not kept
const name = "qformer " + location.pathname;
const within = (mode, use) => new Promise((done, fail) => {
  const request = indexedDB.open(name, 1);
  request.onupgradeneeded = () => request.result.createObjectStore("kept");
  request.onerror = () => fail(request.error);
  request.onsuccess = () => {
    const change = request.result.transaction("kept", mode);
    const asked = use(change.objectStore("kept"));
    change.oncomplete = () => { request.result.close(); done(asked); };
    change.onabort = change.onerror = () => { request.result.close(); fail(change.error); };
  };
});
// What this tab shows: the text of its conversation, its files, their paths, and a mark of this choice of files.
let talk = "", files = [], paths = [], mark = "", choice = 0, isCleared = false;
const isAboutFiles = () => {
  const about = JSON.parse(talk || "{}");
  return JSON.stringify([about.picture ?? null, ...(about.more || [])]) === JSON.stringify(paths);
};
// Always both, since another tab, with other files, may have written meanwhile; the files only where these are others.
const write = () => mark && within("readwrite", (kept) => {
  const former = kept.get("files");
  former.onsuccess = () => {
    if (former.result?.mark !== mark) kept.put({ mark, when: Date.now(), files }, "files");
    kept.put(files.length && isAboutFiles() ? talk : "", "talk");
  };
}).catch(() => {});
const load = async (shown) => {
  const found = [];
  for (const [place, one] of shown.entries()) {
    if (!one?.url) continue;
    const reply = await fetch(one.url);
    if (!reply.ok) return [];  // the reason as JSON, in place of a file that the server no longer has
    found.push({ blob: await reply.blob(), place, name: one.orig_name || "picture", isClip: !!one.isClip });
  }
  return found.reduce((sum, one) => sum + one.blob.size, 0) <= BYTES ? found : [];
};
// What a quick visitor does before the former conversation is back waits, and then takes its place.
let restored = false, waiting = {};
window.qformerKeepTalk = (text) => {
  if (!restored) return void (waiting.talk = text);
  talk = text ?? "";
  if (talk) isCleared = false;
  if (!isCleared) return write();
};
window.qformerForget = () => {
  isCleared = true;  // until the next question, which brings the files that are still shown with it
  return within("readwrite", (kept) => { kept.clear(); }).catch(() => {});
};
window.qformerKeep = async (picture, more) => {
  if (!restored) return void (waiting.files = picture || more?.length ? [picture, more] : null);
  const mine = ++choice;
  const others = (more || []).map((one) => ({ ...(one.image || one.video), isClip: !!one.video }));
  const found = await load([picture, ...others]).catch(() => []);
  if (mine !== choice) return;  // a later choice was faster
  [files, paths, isCleared] = [found, [picture?.path ?? null, ...others.map((one) => one.path)], false];
  mark = `${Date.now()} ${Math.random()}`;
  return write();
};
const restore = async () => {
  const asked = await within("readonly", (all) => [all.get("talk"), all.get("files")]);
  const [text, kept] = asked.map((one) => one.result);
  if (!kept?.files.length || Date.now() - kept.when > DAYS * 864e5) return window.qformerForget();
  const back = { picture: null, more: [] };
  for (const one of kept.files) {
    const { path, url } = await upload(new File([one.blob], one.name, { type: one.blob.type }));
    const file = { path, url, orig_name: one.name, meta: { _type: "gradio.FileData" } };
    if (one.place) back.more.push(one.isClip ? { video: file, caption: null } : { image: file, caption: null });
    else back.picture = file;
  }
  if (waiting.files) return;
  const former = text ? JSON.parse(text) : null;
  if (former) {
    former.picture = back.picture?.path ?? null;
    former.more = back.more.map((one) => (one.image || one.video).path);
  }
  // Without "<", or it would be drawn as HTML, with its scripts.
  props.value = JSON.stringify({ ...back, talk: former }).replaceAll("<", "\\u003c");
  trigger("input");
};
restore().catch(() => {}).finally(() => {
  restored = true;
  if (!waiting.files) return;
  window.qformerKeep(...waiting.files);
  window.qformerKeepTalk(waiting.talk ?? "");
});
