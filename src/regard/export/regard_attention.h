/* Attention of regard for programs without Python: kernels compiled ahead of time, behind a C ABI.
 *
 * The semantics are those of regard.attention, regard.varlen_attention and regard.paged_attention. All pointers but
 * that to the struct itself are device addresses; strides count elements; nothing is copied and nothing waits.
 *
 *     regard_library *library;
 *     regard_attention_args args;
 *     if (regard_open(&library) != REGARD_OK) return fail(regard_last_error());
 *     regard_attention_args_init(&args);
 *     args.q = q; ...
 *     if (regard_attention_forward(library, &args, stream) != REGARD_OK) return fail(regard_last_error());
 */
#ifndef REGARD_ATTENTION_H
#define REGARD_ATTENTION_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define REGARD_API __attribute__((visibility("default")))
#else
#define REGARD_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* What a call returns; regard_last_error has a sentence. */
enum {
    REGARD_OK = 0,
    REGARD_INVALID = 1,     /* an argument is malformed: its name, what was seen, what is needed */
    REGARD_UNSUPPORTED = 2, /* well-formed, but this library has no kernel for it */
    REGARD_DRIVER = 3       /* the GPU's driver is missing, or refused */
};

enum { REGARD_FLOAT16 = 1, REGARD_BFLOAT16 = 2, REGARD_FLOAT32 = 3 };

/* One call. Start with regard_attention_args_init: what has a default gets it, optional addresses are null, and what
 * has to be set is left such that a call that needs it is refused.
 *
 * Heads and head dims: heads_q is a multiple of heads_kv (grouped-query attention). Strides are those of (batch, row,
 * head); elements of a row lie side by side. Where head_dim and head_dim_v are multiples of 16, the strides of q, k, v
 * and out must be too. Strides of dimensions of size 1 are not looked at. Addresses of q, k, v, out, mask and bias are
 * multiples of 16, all others of 4. */
typedef struct regard_attention_args {
    size_t struct_size; /* sizeof(regard_attention_args), by which later versions tell older callers */
    int32_t dtype;      /* of q, k, v, out and bias: REGARD_FLOAT16, ... */

    int32_t batch;      /* B, or the number of packed sequences */
    int32_t seqlen_q;   /* Sq; of packed sequences the longest: of longer ones the rest is neither read nor written */
    int32_t seqlen_k;   /* Sk; likewise; with kv_lens the most keys that one of them may say */
    int32_t heads_q;    /* Hq */
    int32_t heads_kv;   /* Hk */
    int32_t head_dim;   /* D, of q and k */
    int32_t head_dim_v; /* Dv, of v and out; 0: head_dim */

    const void *q; /* (B, Sq, Hq, D), or packed (total_q, Hq, D), whose batch stride is not looked at */
    const void *k; /* (B, Sk, Hk, D), packed (total_k, Hk, D), or paged (pages, page_size, Hk, D) */
    const void *v; /* as k, with Dv */
    void *out;     /* as q, with Dv */
    float *lse;    /* contiguous (B, Hq, Sq), or packed (Hq, total_q): natural log of the softmax denominator */
    int64_t q_strides[3];
    int64_t k_strides[3];
    int64_t v_strides[3];
    int64_t out_strides[3];

    float softmax_scale;  /* positive; 0: head_dim ** -0.5 */
    float softcap;        /* 0 is off; else scores become softcap * tanh(score / softcap) */
    int32_t causal;       /* nonzero: key j is visible to query i iff j <= i + Sk - Sq */
    int32_t window_left;  /* keys visible before position i + Sk - Sq; -1, the default, is unlimited */
    int32_t window_right; /* and after it */

    /* Or null. Rows of Sk elements side by side, each of which can be read up to the next multiple of 16 keys, whatever
     * is there. Strides are those of (batch, head, row): multiples of 16, 0 where the mask or bias is broadcast. */
    const uint8_t *mask; /* nonzero: attend */
    const void *bias;    /* added to the scaled scores */
    int64_t mask_strides[3];
    int64_t bias_strides[3];

    const float *alibi_slopes;  /* or null. (Hq,), or (B, Hq): adds -slope * |i + Sk - Sq - j| */
    int64_t alibi_batch_stride; /* from the slopes of one sequence to the next; 0: the same for all */
    const float *sinks;         /* or null. (Hq,): logits that join the softmax denominator only */

    const int32_t *cu_seqlens_q; /* or null. (B + 1,): packed sequence b is rows cu[b] to cu[b + 1] */
    const int32_t *cu_seqlens_k;
    int32_t total_q; /* rows of packed q, cu_seqlens_q[B] or more; those that belong to no sequence are not written */
    int32_t total_k; /* rows of packed k and v, likewise */

    const int32_t *kv_lens;     /* or null. (B,): keys of each sequence that count; clamped to 0..Sk */
    const int32_t *block_table; /* or null. (B, pages per sequence): pages of each in order, trusted to be of num_pages;
                                 * needs kv_lens, and pages for Sk keys of each sequence, of which those past its
                                 * length are not looked at */
    int64_t block_table_stride; /* from the pages of one sequence to those of the next */
    int32_t num_pages;          /* of k and v */
    int32_t page_size;          /* keys a page */
} regard_attention_args;

/* The gradients of a call. Strides as those of q, k, v and out, and as many elements side by side. Of a padded batch
 * every row is written: keys past kv_lens get 0. */
typedef struct regard_attention_grads {
    size_t struct_size;   /* sizeof(regard_attention_grads) */
    const void *grad_out; /* as out */
    void *dq;             /* as q; of packed sequences only rows that belong to one are written */
    void *dk;             /* as k */
    void *dv;             /* as v */
    int64_t grad_out_strides[3];
    int64_t dq_strides[3];
    int64_t dk_strides[3];
    int64_t dv_strides[3];
    float *scratch; /* twice as long as lse; overwritten */
} regard_attention_grads;

typedef struct regard_library regard_library; /* kernels loaded on one device */

/* Load the kernels for the thread's current device; with CUDA into its current context, which must be there (after
 * cudaSetDevice it is, before CUDA 12 only after a further call such as cudaFree(NULL)).
 * Returns REGARD_OK, REGARD_UNSUPPORTED if none was compiled for such a device, REGARD_DRIVER. */
REGARD_API int regard_open(regard_library **library);

/* Unload them, in any thread, before their context is destroyed. What was launched must have ended. Null does
 * nothing. */
REGARD_API void regard_close(regard_library *library);

/* Start a call: see regard_attention_args. Null does nothing. */
REGARD_API void regard_attention_args_init(regard_attention_args *args);

/* What regard_attention_forward would say of a call, without launching it: REGARD_OK, REGARD_INVALID or
 * REGARD_UNSUPPORTED. */
REGARD_API int regard_attention_check(const regard_library *library, const regard_attention_args *args);

/* Launch one call's attention on a stream (CUstream, cudaStream_t or hipStream_t; null is the default stream) of the
 * device and context of regard_open, whichever are current in the thread: if others are, these are made current for
 * the launch, and the others again after it. Writes out and lse: 0 and -infinity in rows that see no key. From several
 * threads at once it is safe. Returns what regard_attention_check does, or REGARD_DRIVER. */
REGARD_API int regard_attention_forward(const regard_library *library, const regard_attention_args *args, void *stream);

/* Launch the gradients of q, k and v on a stream, given out and lse of the forward; bitwise repeatable. Bias and sinks
 * count, but get none. Returns what regard_attention_forward does. */
REGARD_API int regard_attention_backward(const regard_library *library, const regard_attention_args *args,
                                         const regard_attention_grads *grads, void *stream);

/* What went wrong last in this thread: one sentence, valid until the next call. */
REGARD_API const char *regard_last_error(void);

/* JSON: versions, and what each kernel is for and uses. */
REGARD_API const char *regard_description(void);

#ifdef __cplusplus
}
#endif

#endif
