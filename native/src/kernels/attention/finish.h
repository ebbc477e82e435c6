/* A state becomes a row of the output: the sink, the division by the sum, the lse. */
static void finish(char *out, int32_t dtype, pkv_state state, const float *sink, int32_t head_dim_v,
                   float *lse) {
  float values[PKV_MAX_HEAD_DIM] = {0}, sum = *state.sum, maximum = *state.maximum, rescale = 1.0f;
  if (sink) {
    rescaling scale = to_common_maximum(maximum, *sink);
    rescale = scale.ours;
    sum = sum * scale.ours + scale.theirs;
    maximum = scale.maximum;
  }
  if (sum != 0.0f) /* else no token was visible, or only scores of -inf */
    for (int32_t d = 0; d < head_dim_v; d += WIDTH)
      vec_store(values + d, vec_load(state.accumulated + d) * rescale / sum);
  narrow(out, values, head_dim_v, dtype);
  if (lse) *lse = sum == 0.0f ? -__builtin_inff() : (float)((maximum + log2((double)sum)) * M_LN2);
}

/* What is named alike in every kernel. */
#define KERNEL_FUNCTIONS                                                                                  \
  .prepare_q = prepare_q, .prepare_q8 = prepare_q8, .merge = merge, .finish = finish, .narrow = narrow,   \
  .widen = widen, .quantise = quantise, .dequantise = dequantise, .quantise_channels = quantise_channels, \
  .normalise = normalise, .tally = tally, .dot_bfloat16 = dot_bfloat16, .copy_past_caches = copy_past_caches
