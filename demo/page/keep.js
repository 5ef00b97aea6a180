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
    change.oncomplete = () => { request.result.close(); done(asked.result); };
    change.onerror = () => { request.result.close(); fail(change.error); };
  };
});
const read = (key) => within("readonly", (kept) => kept.get(key));
const write = (key, value) => within("readwrite", (kept) => kept.put(value, key)).catch(() => {});
// What a quick visitor does before the former conversation is back waits, and then takes its place.
let restored = false, waiting = {};
window.qformerKeepTalk = (talk) => restored ? write("talk", talk) : (waiting.talk = talk);
window.qformerForget = () => within("readwrite", (kept) => kept.clear()).catch(() => {});
window.qformerKeep = async (picture, more) => {
  if (!restored) return void (waiting.files = picture || more?.length ? [picture, more] : null);
  const shown = [picture, ...(more || []).map((one) => one.image || one.video)];
  const files = [];
  for (const [place, one] of shown.entries()) {
    if (!one?.url) continue;
    const blob = await (await fetch(one.url)).blob();
    files.push({ blob, place, name: one.orig_name || "picture", isClip: !!(place && more[place - 1].video) });
  }
  const size = files.reduce((sum, one) => sum + one.blob.size, 0);
  await write("files", { when: Date.now(), files: size <= BYTES ? files : [] });
};
const restore = async () => {
  const [text, kept] = await Promise.all([read("talk"), read("files")]);
  if (!kept?.files.length || Date.now() - kept.when > DAYS * 864e5) return window.qformerForget();
  const back = { picture: null, more: [] };
  for (const one of kept.files) {
    const { path, url } = await upload(new File([one.blob], one.name, { type: one.blob.type }));
    const file = { path, url, orig_name: one.name, meta: { _type: "gradio.FileData" } };
    if (one.place) back.more.push(one.isClip ? { video: file, caption: null } : { image: file, caption: null });
    else back.picture = file;
  }
  if (waiting.files) return;
  const talk = text ? JSON.parse(text) : null;
  if (talk) {
    talk.picture = back.picture?.path ?? null;
    talk.more = back.more.map((one) => (one.image || one.video).path);
  }
  props.value = JSON.stringify({ ...back, talk }).replaceAll("<", "\\u003c");  // else drawn as HTML, with its scripts
  trigger("input");
};
restore().catch(() => {}).finally(() => {
  restored = true;
  if (!waiting.files) return;
  window.qformerKeep(...waiting.files);
  window.qformerKeepTalk(waiting.talk ?? "");
});
