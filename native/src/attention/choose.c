/* Page skipping at read: a row reads the top_pages of its sequence whose mean keys score highest.
 *
 *   mean     of a full page's keys, as they are stored, rounded to bfloat16; computed once, when it is first
 *            wanted, and kept beside the pages: forks and cached prefixes have it, too
 *   score    q . mean of each q head, as a softmax over the pages, summed over the q heads of a kv head
 *   choice   for each kv head: the sinks' pages, the first one at least, those that hold the newest 64
 * tokens, and of the others those of the highest score, the earlier one of equals
 *
 * Only rows that are their sequence's one new token choose.  Source: Tang et al., Quest, 2024, whose bound by
 * minima and maxima is worse than the mean for pages of 64 tokens. */
#include "choose.h"

#include <math.h>
#include <stdlib.h>

#include "memory/place.h"
#include "memory/row.h"
#include "visibility.h"

enum { NEWEST_TOKENS = 64 };

typedef struct {
  pkv_job *job;
  int32_t *pages; /* [num_pages]: ids whose mean is computed */
  int64_t num_pages;
  float *scratch; /* [num_workers, scratch_floats] */
  int64_t scratch_floats;
} choice;

static int32_t num_pages_of(const pkv_batch *batch, int64_t seq) {
  return batch->kv_indptr[seq + 1] - batch->kv_indptr[seq];
}

bool pkv_chooses_pages(const pkv_job *job) {
  for (int32_t seq = 0; seq < job->call.batch->num_seqs; seq++)
    if (pkv_chooses(&job->call, seq)) return true;
  return false;
}

/* The places in a sequence's list of the pages that may be skipped: of those that the row sees neither the
 * sinks', without a window the first one, nor those of the newest tokens, which end the list without holes.
 * So they are full. */
typedef struct {
  int32_t first, count;
  int32_t num_fixed; /* pages that are read anyway */
} candidates;

static candidates candidates_of(const pkv_call *call, int32_t seq) {
  const pkv_batch *batch = call->batch;
  int32_t page_size = call->pages->page_size, seq_len = batch->seq_lens[seq];
  int32_t newest = seq_len > NEWEST_TOKENS ? (seq_len - NEWEST_TOKENS) / page_size : 0, num_sinks = 1,
          first = 1;
  if (batch->window) {
    int32_t start = window_start(batch, seq, batch->qo_indptr[seq]) / page_size;
    num_sinks = (int32_t)(((int64_t)batch->num_sink_tokens + page_size - 1) / page_size);
    first = pkv_place_in_list(call, seq, start);
    if (first < num_sinks) first = num_sinks;
    if (newest < start) newest = start;
  }
  int32_t num_newest = (int32_t)(((int64_t)seq_len + page_size - 1) / page_size) - newest;
  int32_t count = num_pages_of(batch, seq) - num_newest - first;
  return (candidates){first, count > 0 ? count : 0, num_sinks + num_newest};
}

/* ---- means */

/* Has a page its mean, since its tokens were written?  Calls of two threads may both compute one: they write
 * the same bytes. */
static bool has_mean(const pkv_pages *pages, int32_t page) {
  return __atomic_load_n(&pages->mean_stamps[page], __ATOMIC_ACQUIRE) == pages->page_stamps[page];
}

static int compare(const void *a, const void *b) {
  int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
  return (x > y) - (x < y);
}

/* List the pages whose mean is missing, each once. */
static void list_pages(choice *choice) {
  const pkv_call *call = &choice->job->call;
  const pkv_batch *batch = call->batch;
  for (int32_t seq = 0; seq < batch->num_seqs; seq++) {
    if (!pkv_chooses(call, seq)) continue;
    candidates candidates = candidates_of(call, seq);
    const int32_t *ids = batch->kv_indices + batch->kv_indptr[seq] + candidates.first;
    for (int32_t i = 0; i < candidates.count; i++)
      if (!has_mean(call->pages, ids[i])) choice->pages[choice->num_pages++] = ids[i];
  }
  if (choice->num_pages) qsort(choice->pages, (size_t)choice->num_pages, sizeof(int32_t), compare);
  int64_t count = 0;
  for (int64_t i = 0; i < choice->num_pages; i++)
    if (i == 0 || choice->pages[i] != choice->pages[i - 1]) choice->pages[count++] = choice->pages[i];
  choice->num_pages = count;
}

static void compute_mean(const pkv_call *call, int32_t page, float *scratch) {
  const pkv_pages *pages = call->pages;
  pkv_place place = pkv_place_of(pages, page);
  const pkv_pages *own = place.pages;
  int32_t dim = pages->head_dim;
  float *row = scratch, *sums = scratch + PKV_MAX_HEAD_DIM;
  for (int32_t head = 0; head < pages->num_kv_heads; head++) {
    const char *keys = place.k + head * own->k_head_stride;
    char *scales = place.k_scales ? place.k_scales + head * own->k_scales.head_stride : NULL;
    memset(sums, 0, (size_t)dim * sizeof *sums);
    for (int64_t t = 0; t < pages->page_size; t++) {
      const char *scale = pkv_scales_at(scales, own->k_scales.token_stride, t, own->k_dtype, dim);
      pkv_read_row(call->kernel, (char *)row, PKV_FLOAT32, keys + t * own->k_token_stride, scale,
                   own->k_dtype, dim);
      for (int32_t d = 0; d < dim; d++) sums[d] += row[d];
    }
    for (int32_t d = 0; d < dim; d++) sums[d] /= (float)pages->page_size;
    uint16_t *mean = pages->means + ((int64_t)page * pages->num_kv_heads + head) * dim;
    call->kernel->narrow((char *)mean, sums, dim, PKV_BFLOAT16);
  }
  __atomic_store_n(&pages->mean_stamps[page], pages->page_stamps[page], __ATOMIC_RELEASE);
}

static void compute_means(void *context, int32_t worker) {
  choice *choice = context;
  long long i;
  while ((i = atomic_fetch_add(&choice->job->next_item, 1)) < choice->num_pages)
    compute_mean(&choice->job->call, choice->pages[i], choice->scratch + worker * choice->scratch_floats);
}

/* ---- choices */

/* The k-th largest of some scores; they are reordered.  No NaN. */
static float kth_largest(float *scores, int32_t count, int32_t k) {
  int32_t begin = 0, end = count;
  while (end - begin > 1) {
    float pivot = scores[begin + (end - begin) / 2];
    int32_t left = begin, right = end - 1;
    while (left <= right) {
      while (scores[left] > pivot) left++;
      while (scores[right] < pivot) right--;
      if (left > right) break;
      float other = scores[left];
      scores[left++] = scores[right];
      scores[right--] = other;
    }
    if (k - 1 <= right)
      end = right + 1;
    else if (k - 1 >= left)
      begin = left;
    else
      return scores[k - 1];
  }
  return scores[begin];
}

/* Softmax over `count` scores in units of log2, added to totals. */
static void add_softmax(const pkv_kernel *kernel, float *scores, int32_t count, float *totals) {
  float largest = -INFINITY, sum = 0;
  int32_t padded = (count + 15) / 16 * 16;
  for (int32_t i = 0; i < count; i++)
    if (scores[i] > largest) largest = scores[i];
  if (largest == -INFINITY) return;
  for (int32_t i = count; i < padded; i++) scores[i] = -INFINITY;
  kernel->normalise(scores, scores, padded, largest, 1.0f);
  for (int32_t i = 0; i < count; i++) sum += scores[i] == scores[i] ? scores[i] : 0;
  for (int32_t i = 0; i < count && sum > 0; i++) totals[i] += scores[i] == scores[i] ? scores[i] / sum : 0;
}

/* Choose for one kv head of a sequence: 1 for each listed page that it reads. */
static void choose_for_head(const pkv_job *job, int32_t seq, int32_t head, float *scratch, uint8_t *chosen) {
  const pkv_call *call = &job->call;
  const pkv_pages *pages = call->pages;
  const pkv_tensor *q = &job->attention->q;
  int32_t dim = pages->head_dim, group = call->layer.group, num_pages = num_pages_of(call->batch, seq);
  candidates candidates = candidates_of(call, seq);
  int32_t count = candidates.count, wanted = job->attention->top_pages - candidates.num_fixed;
  memset(chosen, 1, (size_t)num_pages);
  if (wanted >= count) return;
  chosen += candidates.first;
  memset(chosen, 0, (size_t)count);
  if (wanted <= 0) return;
  int64_t room = (count + 15) / 16 * 16;
  float *prepared = scratch, *scores = scratch + PKV_MAX_HEAD_DIM, *totals = scores + room;
  const int32_t *ids = call->batch->kv_indices + call->batch->kv_indptr[seq] + candidates.first;
  memset(totals, 0, (size_t)count * sizeof *totals);
  for (int32_t i = 0; i < group; i++) {
    const char *from =
        q->data + call->batch->qo_indptr[seq] * q->token_stride + (head * group + i) * q->head_stride;
    call->kernel->prepare_q(prepared, from, q->dtype, job->scale, dim);
    for (int32_t page = 0; page < count; page++) {
      const uint16_t *mean = pages->means + ((int64_t)ids[page] * pages->num_kv_heads + head) * dim;
      scores[page] = call->kernel->dot_bfloat16(prepared, mean, dim);
    }
    add_softmax(call->kernel, scores, count, totals);
  }
  memcpy(scores, totals, (size_t)count * sizeof *scores);
  float least = kth_largest(scores, count, wanted);
  for (int32_t page = 0; page < count; page++) wanted -= chosen[page] = totals[page] > least;
  for (int32_t page = 0; page < count && wanted > 0; page++)
    if (totals[page] == least) wanted -= chosen[page] = 1;
}

static void choose_for_heads(void *context, int32_t worker) {
  choice *choice = context;
  pkv_job *job = choice->job;
  const pkv_batch *batch = job->call.batch;
  int64_t num_heads = job->call.pages->num_kv_heads, num_tasks = batch->num_seqs * num_heads;
  long long i;
  while ((i = atomic_fetch_add(&job->next_item, 1)) < num_tasks) {
    int32_t seq = (int32_t)(i / num_heads), head = (int32_t)(i % num_heads);
    if (!pkv_chooses(&job->call, seq)) continue;
    choose_for_head(job, seq, head, choice->scratch + worker * choice->scratch_floats,
                    job->chosen + pkv_chosen_at(&job->call, seq, head));
  }
}

static int64_t most_pages(const pkv_batch *batch) {
  int32_t most = 0;
  for (int64_t seq = 0; seq < batch->num_seqs; seq++)
    if (most < num_pages_of(batch, seq)) most = num_pages_of(batch, seq);
  return most;
}

static int64_t scratch_floats_of(const pkv_job *job) {
  return 2 * PKV_MAX_HEAD_DIM + 2 * ((most_pages(job->call.batch) + 15) / 16 * 16);
}

size_t pkv_choice_bytes(const pkv_job *job, int32_t num_workers) {
  const pkv_batch *batch = job->call.batch;
  size_t num_pages = (size_t)batch->kv_indptr[batch->num_seqs];
  size_t chosen = (num_pages * (size_t)job->call.pages->num_kv_heads + 63) / 64 * 64;
  size_t pages = (num_pages * sizeof(int32_t) + 63) / 64 * 64;
  return chosen + pages + (size_t)(num_workers * scratch_floats_of(job)) * sizeof(float);
}

void pkv_choose_pages(int32_t num_workers, pkv_job *job, char *memory) {
  const pkv_batch *batch = job->call.batch;
  size_t num_pages = (size_t)batch->kv_indptr[batch->num_seqs];
  choice choice = {.job = job, .scratch_floats = scratch_floats_of(job)};
  job->chosen = (uint8_t *)memory;
  memory += (num_pages * (size_t)job->call.pages->num_kv_heads + 63) / 64 * 64;
  choice.pages = (int32_t *)memory;
  choice.scratch = (float *)(memory + (num_pages * sizeof(int32_t) + 63) / 64 * 64);
  list_pages(&choice);
  if (choice.num_pages) pkv_threads_run(num_workers, compute_means, &choice);
  atomic_store(&job->next_item, 0);
  pkv_threads_run(num_workers, choose_for_heads, &choice);
  atomic_store(&job->next_item, 0);
  job->call.chosen = job->chosen;
}
