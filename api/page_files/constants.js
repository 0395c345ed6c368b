// What the API fixes for every model, so that GET /v1/models does not say it. tests/api/test_page.py holds it against the server.

/** What states begin with in each stage, in order. */
export const STATE_OF_STAGE = { encoder: "ENCODER", denoiser: "DENOISING", decoder: "DECODER" };
export const STAGES = Object.keys(STATE_OF_STAGE);

/** For each medium the formats that a browser shows. */
export const OUTPUT_FORMATS = {
  image: ["png", "jpeg", "webp"],
  video: ["mp4", "gif", "webp"],
  audio: ["wav"],
};

export const MAX_IMAGES = 10;
export const MAX_PARTIAL_IMAGES = 3;
export const MAX_PRIORITY = 100;
