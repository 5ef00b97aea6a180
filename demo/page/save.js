// Saves a text from the server as a file of the visitor; nothing is written on the server.
(made) => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([made.text], {type: made.type}));
  link.download = made.name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
