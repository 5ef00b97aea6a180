// Fills the components with what was kept, unless the visitor has begun anew meanwhile.
(sent, picture, more, talk) => {
  if (picture || more?.length || talk) return [picture, more, talk];
  const back = JSON.parse(sent);
  return [back.picture, back.more.length ? back.more : null, back.talk ? JSON.stringify(back.talk) : ""];
}
