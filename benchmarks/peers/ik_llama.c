/* SPDX-License-Identifier: Apache-2.0 */
/* What e2e_ik_llama.py asks of ik_llama.cpp, compiled against its own header: ctypes then needs to
 * know no layout of its structs. One model and one context at a time. */
#include "llama.h"

static struct llama_model *model;
static struct llama_context *context;
static struct llama_batch batch;

int
ik_load(const char *path)
{
    struct llama_model_params options = llama_model_default_params();
    llama_backend_init();
    options.repack_tensors = true; /* its interleaved formats, made while loading */
    options.use_mmap = false;
    model = llama_model_load_from_file(path, options);
    return model ? 0 : -1;
}

const char *
ik_info(void)
{
    return llama_print_system_info();
}

int
ik_open(int sequences, int capacity, int micro_batch, int threads)
{
    struct llama_context_params options = llama_context_default_params();
    if (context) {
        llama_free(context);
        llama_batch_free(batch);
    }
    const int tokens = sequences * capacity;
    options.n_ctx = (uint32_t)tokens;
    options.n_batch = (uint32_t)tokens;
    options.n_ubatch = (uint32_t)(tokens < micro_batch ? tokens : micro_batch);
    options.n_seq_max = (uint32_t)sequences;
    options.n_threads = options.n_threads_batch = (uint32_t)threads;
    context = llama_init_from_model(model, options);
    batch = llama_batch_init(tokens, 0, 1);
    return context ? 0 : -1;
}

/* Logits [sequences][vocab] of the last tokens of tokens [sequences][length], or of all tokens
 * [sequences * length][vocab]; NULL: refused. start: the position of the first. */
const float *
ik_run(const int *tokens, int sequences, int length, int start, int all)
{
    batch.n_tokens = sequences * length;
    for (int i = 0; i < batch.n_tokens; i++) {
        batch.token[i] = tokens[i];
        batch.pos[i] = start + i % length;
        batch.n_seq_id[i] = 1;
        batch.seq_id[i][0] = i / length;
        batch.logits[i] = (int8_t)(all || i % length == length - 1);
    }
    return llama_decode(context, batch) ? NULL : llama_get_logits(context);
}

void
ik_rewind(int length)
{
    if (length == 0) {
        llama_kv_cache_clear(context);
    }
    else {
        llama_kv_cache_seq_rm(context, -1, length, -1);
    }
}

/* Gives sequences 1 .. sequences - 1 what sequence 0 holds. */
void
ik_spread(int sequences)
{
    for (int i = 1; i < sequences; i++) {
        llama_kv_cache_seq_cp(context, 0, i, -1, -1);
    }
}
