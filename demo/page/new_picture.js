// Begins a new conversation for other pictures, at once, so that no question can come between.
(picture, more, talk, said, prompt) => {
  const about = JSON.parse(talk || "{}"), files = (more || []).map((one) => (one.image || one.video).path);
  const same = (about.picture ?? null) === (picture?.path ?? null)
    && JSON.stringify(about.more || []) === JSON.stringify(files);
  return talk && same ? [talk, said, prompt] : ["", NOTHING, ""];
}
