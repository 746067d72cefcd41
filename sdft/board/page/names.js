// Names and meanings of what is logged, and pictures with links to their files.

const WATCHED = {
  style_gain: "How far the pictures have moved to the style: 0 is the base model, 1 pictures of the style.",
  identity: "How far the pictures have moved to the subject: 0 is the base model, 1 pictures of the subject.",
  adherence: "How well the pictures show what their prompt says: 1 is the base model, 0 a picture of another prompt.",
  forgetting: "How much worse prompts of other things are followed than by the base model. The lower, the better.",
  novelty: "Distance to the nearest training picture. Near 0, the model copies: stop earlier, or train on more pictures.",
  memorisation: "How close the pictures come to single training pictures. If it rises late, stop earlier.",
};
const NAMES = {
  "train/loss": ["Training loss", "As it is trained: weighted, over random timesteps. It is noisy; look at the smoothed line."],
  "train/eps_mse": ["Unweighted training loss", "Of all timesteps alike: the one to compare with held-out pictures and other runs."],
  "val/eps_mse": ["Error on held-out pictures", "Always with the same noise, so small changes count. If it rises, the model learns its pictures by heart."],
  "val/loss": ["Loss on held-out pictures", "If it rises, the model learns its pictures by heart."],
  "train/prior": ["Loss of the prior", "Of what the base model does with other captions."],
  "train/accuracy": ["Pairs in the right order", "Share of training pairs whose preferred picture the model has come to favour."],
  "train/gradient_norm": ["Gradient norm", "Before clipping. Sudden peaks mean an unstable run: lower the rate."],
};
const LOOKS = ["blue", "orange", "green", "purple"];
const GIB = (value) => `${number(value)} GiB`;

/** An image with a tag, linked to its file; a missing one is a grey square. */
function shot(picture, tag, alt) {
  if (!picture) return make("span", { className: "shot missing" }, "missing");
  const image = make("img", { src: picture.uri, alt, width: picture.width, height: picture.height, className: picture.whole && picture.width <= 128 ? "hard" : "" });
  const label = tag ? make("span", { className: "tag" }, tag) : null;
  if (!picture.file) return make("span", { className: "shot" }, image, label);
  return make("a", { className: "shot", href: pathTo(picture.file), target: "_blank", rel: "noopener" }, image, label);
}

/** A path in the run folder as a link: `#`, `?` and `%` are escaped, and it cannot begin with a scheme. */
function pathTo(file) {
  return `./${file.split("/").map(encodeURIComponent).join("/")}`;
}
