/* Attention mass: the probabilities of each page's tokens, of the rows that look at them (mass.c). */
#ifndef PKV_MASS_H
#define PKV_MASS_H
#include "items.h"
#include "visibility.h"

/* What a worker needs to note the weights of its items, floats, and to add them up, bytes. */
void pkv_size_masses(pkv_job *job);
/* Floats that a row's head notes of a span. */
int32_t pkv_span_notes(const pkv_call *call);

/* Where an item notes weights: in a worker's memory, or, in pieces, in the item's own. */
pkv_masses pkv_masses_of(const pkv_job *job, const work_item *item, span_list spans, int32_t worker);
/* From span `span` on. */
pkv_masses pkv_masses_from(const pkv_call *call, const pkv_masses *masses, int32_t span);
/* Where the shared items of a row, and of those that follow, note weights: all q heads, from span 0 on. */
pkv_masses pkv_carried_masses(const pkv_job *job, int32_t cascade_row);
size_t pkv_carried_bytes(const pkv_job *job);
/* Nothing is noted of these spans by an item's rows and heads. */
void pkv_clear_masses(const pkv_job *job, const work_item *item, const pkv_masses *masses, int32_t first_span,
                      int32_t end_span);
/* Add what was noted of an item to the pages, now that its states are final. */
void pkv_add_masses(const pkv_job *job, const work_item *item, span_list spans, float *states,
                    const pkv_masses *masses, int32_t worker);
/* When all items have ended: what the caller gets, and what is added to a plan, which may be NULL. */
void pkv_sum_masses(const pkv_job *job, pkv_plan *plan);

#endif
