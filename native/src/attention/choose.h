/* Which pages single rows read, where a call reads top_pages of each sequence only (choose.c). */
#ifndef PKV_CHOOSE_H
#define PKV_CHOOSE_H
#include "items.h"

/* Does any sequence of the call read fewer pages than it has? */
bool pkv_chooses_pages(const pkv_job *job);
/* Bytes of the call's memory that choosing takes. */
size_t pkv_choice_bytes(const pkv_job *job, int32_t num_workers);
/* Choose: fills job->chosen.  memory: pkv_choice_bytes. */
void pkv_choose_pages(int32_t num_workers, pkv_job *job, char *memory);

#endif
