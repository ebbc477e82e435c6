/* Validates a caller's indptr arrays and page ids, and makes them a pkv_batch.
 *
 * A sequence's length follows from its page count and kv_last_page_len. */
#include <stdbool.h>
#include <string.h>

#include "paged_kv.h"

static pkv_foreign_fault refuse(pkv_refusal *refusal, pkv_foreign_fault fault, int64_t index,
                                int64_t requested, int64_t available) {
  *refusal = (pkv_refusal){index, requested, available};
  return fault;
}

/* Does an indptr begin with 0, never decrease, and end at `end` (or before, when it may)? */
static bool is_indptr(const int64_t *indptr, int64_t count, int64_t end, bool may_end_before) {
  if (indptr[0] != 0) return false;
  for (int64_t i = 0; i < count; i++)
    if (indptr[i + 1] < indptr[i]) return false;
  return indptr[count] <= INT32_MAX && (may_end_before ? indptr[count] <= end : indptr[count] == end);
}

pkv_foreign_fault pkv_batch_of_foreign(const pkv_foreign *lists, int32_t *memory, pkv_batch *batch,
                                       pkv_refusal *refusal) {
  int64_t num_seqs = lists->num_seqs;
  if (!is_indptr(lists->qo_indptr, num_seqs, lists->num_rows, false))
    return refuse(refusal, PKV_BAD_QO_INDPTR, -1, lists->qo_indptr[num_seqs], lists->num_rows);
  if (!is_indptr(lists->kv_indptr, num_seqs, lists->num_indices, true))
    return refuse(refusal, PKV_BAD_KV_INDPTR, -1, lists->kv_indptr[num_seqs], lists->num_indices);
  batch->num_seqs = num_seqs;
  batch->may_share = num_seqs > 1 ? PKV_SHARE_WHAT_PAYS : PKV_SHARE_NONE;
  batch->qo_indptr = memory;
  batch->kv_indptr = batch->qo_indptr + num_seqs + 1;
  batch->seq_lens = batch->kv_indptr + num_seqs + 1;
  batch->kv_indices = batch->seq_lens + num_seqs;
  for (int64_t i = 0; i < lists->kv_indptr[num_seqs]; i++) {
    int64_t page_id = lists->kv_indices[i];
    if (page_id < 0 || page_id >= lists->num_pages)
      return refuse(refusal, PKV_BAD_KV_INDEX, i, page_id, lists->num_pages - 1);
    batch->kv_indices[i] = (int32_t)page_id;
  }
  for (int64_t i = 0; i <= num_seqs; i++) {
    batch->qo_indptr[i] = (int32_t)lists->qo_indptr[i];
    batch->kv_indptr[i] = (int32_t)lists->kv_indptr[i];
  }
  for (int64_t i = 0; i < num_seqs; i++) {
    int64_t num_pages = lists->kv_indptr[i + 1] - lists->kv_indptr[i], last = lists->kv_last_page_len[i];
    if (last < (num_pages > 0) || last > lists->page_size)
      return refuse(refusal, PKV_BAD_LAST_PAGE, i, last, lists->page_size);
    int64_t seq_len = num_pages ? (num_pages - 1) * lists->page_size + last : 0;
    if (seq_len > INT32_MAX) return refuse(refusal, PKV_TOO_LONG, i, seq_len, INT32_MAX);
    int64_t num_rows = lists->qo_indptr[i + 1] - lists->qo_indptr[i];
    if (!batch->sees_all && num_rows > seq_len)
      return refuse(refusal, PKV_MORE_ROWS_THAN_TOKENS, i, num_rows, seq_len);
    batch->seq_lens[i] = (int32_t)seq_len;
  }
  return PKV_FOREIGN_OK;
}
