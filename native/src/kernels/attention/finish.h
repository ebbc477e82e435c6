/* A state to a row of the output: the sink, the division by the sum, the lse. */
static void finish(char *out, int32_t dtype, pkv_state state, const float *sink, int32_t head_dim_v,
                   float *lse) {
  float values[PKV_MAX_HEAD_DIM] = {0}, sum = *state.sum, maximum = *state.maximum, shrink = 1.0f;
  if (sink) {
    common scale = in_common(maximum, *sink);
    shrink = scale.ours;
    sum = sum * scale.ours + scale.theirs;
    maximum = scale.maximum;
  }
  if (sum != 0.0f) /* else nothing was seen, or only scores of -inf */
    for (int32_t d = 0; d < head_dim_v; d += WIDTH)
      vec_store(values + d, vec_load(state.accumulated + d) * shrink / sum);
  narrow(out, values, head_dim_v, dtype);
  if (lse) *lse = sum == 0.0f ? -__builtin_inff() : (float)((maximum + log2((double)sum)) * M_LN2);
}
