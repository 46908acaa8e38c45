/* Calls with random fields, under sanitizers and beside `fake_driver.c`: every launch must be what its call says, and
 * nothing that a kernel computes in 32 bits may overflow. Prints how many calls of each status there were. */
#include "regard_attention.c" /* of the exported folder: its tables say what a parameter is */

#include <pthread.h>

typedef int (*launch_callback)(int module, const char *name, unsigned programs, unsigned threads, unsigned shared,
                               void *stream, void **parameters);
void fake_driver(launch_callback launch, int refused_images, int launch_error);
int fake_loaded(void);

static regard_attention_args args;
static regard_attention_grads grads;
static int launches;

static uint64_t state = 1;
static uint64_t random_below(uint64_t bound) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (state >> 33) % bound;
}

#define MUST(holds)                                                     \
    do {                                                                \
        if (!(holds)) {                                                 \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #holds); \
            abort();                                                    \
        }                                                               \
    } while (0)

/* Of a launch's parameters that of a slot; null where its kernel has none. */
static const union value *parameter(const struct kernel *kernel, void **parameters, int slot) {
    for (int i = 0; i < kernel->slot_count; i++) {
        if (kernel->slots[i] == slot) return parameters[i];
    }
    return NULL;
}

static void must_be_tensor(const struct kernel *kernel, void **parameters, int pointer, int first, const void *address,
                           const int64_t *strides, const int64_t *sizes, int row, int64_t length, int least,
                           int itemsize) {
    const union value *given = parameter(kernel, parameters, pointer);
    __int128 last = length - 1;
    if (given == NULL || length == 0 || sizes[0] * sizes[1] * sizes[2] == 0) return;
    MUST(given->pointer == address && address != NULL && (uintptr_t)address % 16 == 0);
    for (int i = 0; i < 3; i++) {
        const union value *stride = parameter(kernel, parameters, first + i);
        int64_t seen = i == row ? stride->i32 : stride->i64;
        if (sizes[i] < 2) {
            MUST(args.cu_seqlens_q == NULL || i > 0 || seen == 0);
            continue;
        }
        MUST(seen == strides[i] && seen >= least);
        MUST(i != row || ((int64_t)seen + 1) * 256 <= INT32_MAX);
        last += (__int128)(sizes[i] - 1) * seen;
    }
    MUST(last < (__int128)1 << 62);
    MUST(kernel->most_bytes == 0 || (last + 1) * itemsize <= kernel->most_bytes);
}

static int on_launch(int module, const char *name, unsigned programs, unsigned threads, unsigned shared, void *stream,
                     void **parameters) {
    const struct kernel *kernel = &kernels[module % KERNEL_COUNT];
    int packed = args.cu_seqlens_q != NULL, paged = args.block_table != NULL, dim = args.head_dim;
    int dim_v = args.head_dim_v ? args.head_dim_v : dim, of_keys = kernel->step == STEP_keys;
    int size = args.dtype == REGARD_FLOAT32 ? 4 : 2;
    int64_t batch = packed ? 1 : args.batch, rows = packed ? args.total_q : args.seqlen_q;
    int64_t keys = packed ? args.total_k : paged ? args.page_size : args.seqlen_k, heads = args.heads_q;
    const int64_t q[] = {batch, rows, heads}, pairs[] = {batch, heads, rows};
    const int64_t k[] = {paged ? args.num_pages : batch, keys, args.heads_kv};
    const int64_t readable = (args.seqlen_k + 15LL) / 16 * 16;
    (void)threads, (void)shared, (void)stream;
    MUST(strcmp(name, kernel->name) == 0);
    launches++;

    int64_t blocks = of_keys ? args.seqlen_k : kernel->step == STEP_row_terms ? rows : args.seqlen_q;
    __int128 needed = (blocks + kernel->rows - 1) / kernel->rows;
    needed *= kernel->step == STEP_row_terms ? batch : args.batch;
    needed *= of_keys ? args.heads_kv : heads;
    MUST(needed == programs && needed <= INT32_MAX);
    MUST((int64_t)args.batch * heads <= INT32_MAX);

#define TENSOR(name, from, sizes, row, length, least, itemsize)                                                        \
    must_be_tensor(kernel, parameters, SLOT_##name##_ptr, SLOT_##name##_strides_0, (from).name, (from).name##_strides, \
                   sizes, row, length, least, itemsize)
    TENSOR(q, args, q, 1, dim, 0, size);
    TENSOR(out, args, q, 1, dim_v, kernel->step == STEP_forward ? dim_v : 0, size);
    TENSOR(k, args, k, 1, dim, 0, size);
    TENSOR(v, args, k, 1, dim_v, 0, size);
    TENSOR(mask, args, pairs, 2, readable, 0, 1);
    TENSOR(bias, args, pairs, 2, readable, 0, size);
    TENSOR(grad_out, grads, q, 1, dim_v, 0, size);
    TENSOR(dq, grads, q, 1, dim, dim, size);
    TENSOR(dk, grads, k, 1, dim, dim, size);
    TENSOR(dv, grads, k, 1, dim_v, dim_v, size);

    const struct {
        int slot;
        const void *address;
    } arrays[] = {
        {SLOT_lse_ptr, args.lse},
        {SLOT_alibi_ptr, args.alibi_slopes},
        {SLOT_sinks_ptr, args.sinks},
        {SLOT_cu_seqlens_q_ptr, args.cu_seqlens_q},
        {SLOT_cu_seqlens_k_ptr, args.cu_seqlens_k},
        {SLOT_kv_lens_ptr, args.kv_lens},
        {SLOT_block_table_ptr, args.block_table},
        {SLOT_row_lse_ptr, grads.scratch},
        {SLOT_delta_ptr, (void *)((uintptr_t)grads.scratch + 4 * (uintptr_t)(batch * rows * heads))},
    };
    for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++) {
        const union value *given = parameter(kernel, parameters, arrays[i].slot);
        if (given == NULL || rows == 0) continue;
        MUST(given->pointer == arrays[i].address && given->pointer != NULL && (uintptr_t)given->pointer % 4 == 0);
    }
    MUST((__int128)batch * rows * heads <= (__int128)1 << (kernel->step == STEP_forward ? 60 : 59));
    const struct {
        int slot;
        int64_t number;
    } wide[] = {
        {SLOT_lse_strides_0, packed ? 0 : rows * heads},
        {SLOT_lse_strides_1, rows},
        {SLOT_alibi_strides_0, args.alibi_batch_stride},
        {SLOT_block_table_stride, args.block_table_stride},
    };
    for (size_t i = 0; i < sizeof wide / sizeof *wide; i++) {
        const union value *given = parameter(kernel, parameters, wide[i].slot);
        MUST(given == NULL || given->i64 == wide[i].number);
    }
    if (packed) MUST(!args.mask && !args.bias && !args.kv_lens && !args.block_table);
    if (kernel->step == STEP_row_terms) MUST(parameter(kernel, parameters, SLOT_rows)->i32 == rows);
    if (kernel->step == STEP_row_terms) return 0;

    int64_t seqlen_q = parameter(kernel, parameters, SLOT_seqlen_q)->i32;
    int64_t seqlen_k = parameter(kernel, parameters, SLOT_seqlen_k)->i32;
    const union value *left = parameter(kernel, parameters, SLOT_window_left);
    const union value *right = parameter(kernel, parameters, SLOT_window_right);
    MUST(seqlen_q == args.seqlen_q && seqlen_k == args.seqlen_k);
    MUST(parameter(kernel, parameters, SLOT_group)->i32 == args.heads_q / args.heads_kv);
    float scale = args.softmax_scale > 0 ? args.softmax_scale : (float)pow(args.head_dim, -0.5);
    MUST(parameter(kernel, parameters, SLOT_softmax_scale)->fp32 == scale);
    const union value *readable_k = parameter(kernel, parameters, SLOT_readable_k);
    const union value *page_size = parameter(kernel, parameters, SLOT_page_size);
    MUST(readable_k == NULL || readable_k->i32 == readable);
    MUST(page_size == NULL || !paged || page_size->i32 == args.page_size);
    MUST(!packed || (args.total_q + 256LL <= INT32_MAX && args.total_k + 256LL <= INT32_MAX));
    if (right != NULL) {
        MUST(seqlen_k + 256 + right->i32 <= INT32_MAX);
        MUST(args.causal ? right->i32 == 0 : right->i32 == args.window_right || right->i32 >= seqlen_q - 1);
    }
    if (left != NULL) {
        MUST(seqlen_q + 256 + left->i32 <= INT32_MAX);
        MUST(left->i32 == args.window_left || left->i32 >= seqlen_k - 1);
    }
    return 0;
}

static int32_t any_i32(void) {
    static const int32_t some[] = {INT32_MIN,        -2,       -1, 0, 1, 2, 6, 15, 16, 1 << 24, 1 << 30,
                                   INT32_MAX - 1024, INT32_MAX};
    return some[random_below(sizeof some / sizeof *some)];
}

static int64_t any_i64(void) {
    static const int64_t some[] = {
        INT64_MIN, -16,     -1,        0,         1,         16,        48,        1 << 20,
        8388592,   8388608, INT32_MAX, 1LL << 31, 1LL << 40, 1LL << 58, 1LL << 61, INT64_MAX - 15,
        INT64_MAX};
    return some[random_below(sizeof some / sizeof *some)];
}

static float any_fp32(void) {
    static const float some[] = {NAN, INFINITY, -INFINITY, -0.0f, 0, -1, 1e-45f, 1e-6f, 30, 128, 4096, 3e38f};
    return some[random_below(sizeof some / sizeof *some)];
}

static void *any_address(void) {
    static const uintptr_t some[] = {0, 1, 4, 8, 16, 1 << 20, UINTPTR_MAX - 15, UINTPTR_MAX};
    return (void *)some[random_below(sizeof some / sizeof *some)];
}

static void set_strides(int64_t *strides, int64_t batch, int64_t row, int64_t head) {
    strides[0] = batch, strides[1] = row, strides[2] = head;
}

/* A call that has a random kernel. */
static void well_formed(void) {
    const struct kernel *kernel = &kernels[random_below(KERNEL_COUNT)];
    void *address = (void *)(uintptr_t)(1 << 20);
    int dim = kernel->head_dim, dim_v = kernel->head_dim_v;
    regard_attention_args_init(&args);
    args.dtype = kernel->dtype, args.head_dim = dim, args.head_dim_v = dim_v;
    args.batch = 2, args.seqlen_q = 100, args.seqlen_k = 200, args.heads_q = 6, args.heads_kv = 2;
    args.q = args.k = args.v = args.out = args.lse = address;
    set_strides(args.q_strides, 600 * dim, 6 * dim, dim), set_strides(args.out_strides, 600 * dim_v, 6 * dim_v, dim_v);
    set_strides(args.k_strides, 400 * dim, 2 * dim, dim), set_strides(args.v_strides, 400 * dim_v, 2 * dim_v, dim_v);
    set_strides(args.mask_strides, 0, 0, 208), set_strides(args.bias_strides, 0, 0, 208);
    if (kernel->features & FEATURE_causal) args.causal = 1;
    if (kernel->features & FEATURE_window) args.window_left = 5;
    if (kernel->features & FEATURE_mask) args.mask = address;
    if (kernel->features & FEATURE_bias) args.bias = address;
    if (kernel->features & FEATURE_softcap) args.softcap = 30;
    if (kernel->features & FEATURE_alibi) args.alibi_slopes = address;
    if (kernel->features & FEATURE_sinks) args.sinks = address;
    if (kernel->features & FEATURE_varlen) {
        args.cu_seqlens_q = args.cu_seqlens_k = address;
        args.total_q = 150, args.total_k = 300;
    }
    if (kernel->features & (FEATURE_kv_lens | FEATURE_paged)) args.kv_lens = address;
    if (kernel->features & FEATURE_paged) {
        args.block_table = address, args.block_table_stride = 13, args.num_pages = 50, args.page_size = 16;
    }
    grads = (regard_attention_grads){.struct_size = sizeof grads, .grad_out = address, .scratch = address};
    grads.dq = grads.dk = grads.dv = address;
    memcpy(grads.grad_out_strides, args.out_strides, sizeof args.out_strides);
    memcpy(grads.dq_strides, args.q_strides, sizeof args.q_strides);
    memcpy(grads.dk_strides, args.k_strides, sizeof args.k_strides);
    memcpy(grads.dv_strides, args.v_strides, sizeof args.v_strides);
}

static void change_a_field(void) {
    int32_t *const i32[] = {&args.dtype,        &args.batch,    &args.seqlen_q,   &args.seqlen_k,  &args.heads_q,
                            &args.heads_kv,     &args.head_dim, &args.head_dim_v, &args.causal,    &args.window_left,
                            &args.window_right, &args.total_q,  &args.total_k,    &args.num_pages, &args.page_size};
    int64_t *const i64[] = {args.q_strides,    args.k_strides,        args.v_strides,   args.out_strides,
                            args.mask_strides, args.bias_strides,     grads.dq_strides, grads.dk_strides,
                            grads.dv_strides,  grads.grad_out_strides};
    const void **const read[] = {&args.q, &args.k, &args.v, &args.bias, &grads.grad_out};
    void **const written[] = {&args.out, &grads.dq, &grads.dk, &grads.dv};
    switch (random_below(20)) {
        case 0:
            args.struct_size = random_below(300);
            break;
        case 1:
            args.softmax_scale = any_fp32();
            break;
        case 2:
            args.softcap = any_fp32();
            break;
        case 3:
            *read[random_below(5)] = any_address();
            break;
        case 4:
            *written[random_below(4)] = any_address();
            break;
        case 5:
            args.lse = any_address();
            break;
        case 6:
            grads.scratch = any_address();
            break;
        case 7:
            args.mask = any_address();
            break;
        case 8:
            args.kv_lens = any_address();
            break;
        case 9:
            args.block_table = any_address();
            break;
        case 10:
            args.cu_seqlens_q = any_address();
            break;
        case 11:
            args.alibi_slopes = any_address();
            break;
        case 12:
            args.alibi_batch_stride = any_i64();
            break;
        case 13:
            args.block_table_stride = any_i64();
            break;
        case 14:
        case 15:
        case 16:
            i64[random_below(10)][random_below(3)] = any_i64();
            break;
        default:
            *i32[random_below(15)] = any_i32();
            break;
    }
}

static void *fail_elsewhere(void *library) {
    MUST(regard_attention_check(library, NULL) == REGARD_INVALID && strstr(regard_last_error(), "args: got null"));
    return NULL;
}

/* Libraries come and go, two at once too, and each thread has its own last error. */
static void open_and_close(void) {
    pthread_t thread;
    for (int i = 0; i < 20; i++) {
        regard_library *libraries[2];
        fake_driver(on_launch, 0, 0); /* which has room for so many modules */
        for (int each = 0; each < 2 && each * KERNEL_COUNT < 32; each++) {
            MUST(regard_open(&libraries[each]) == REGARD_OK);
            if (each == 0) continue;
            MUST(regard_attention_check(NULL, NULL) == REGARD_INVALID);
            MUST(pthread_create(&thread, NULL, fail_elsewhere, libraries[0]) == 0 && pthread_join(thread, NULL) == 0);
            MUST(strstr(regard_last_error(), "library: got null"));
            regard_close(libraries[1]);
        }
        regard_close(libraries[0]);
        MUST(fake_loaded() == 0);
    }
    MUST(regard_open(NULL) == REGARD_INVALID);
    regard_close(NULL);
    regard_attention_args_init(NULL);
}

int main(void) {
    regard_library *library;
    int found[2][4] = {{0}};
    open_and_close();
    fake_driver(on_launch, 0, 0);
    if (regard_open(&library) != REGARD_OK) return fprintf(stderr, "%s\n", regard_last_error()), 1;
    for (int call = 0; call < 60000; call++) {
        well_formed();
        for (uint64_t changes = random_below(4); changes > 0; changes--) change_a_field();
        int backward = random_below(2) == 1, before = launches;
        int status = backward ? regard_attention_backward(library, &args, &grads, NULL)
                              : regard_attention_forward(library, &args, NULL);
        MUST(status >= REGARD_OK && status < REGARD_DRIVER);
        MUST(status == REGARD_OK || launches == before);
        MUST(status == REGARD_OK || strstr(regard_last_error(), ", needs ") != NULL);
        MUST(backward || regard_attention_check(library, &args) == status);
        found[backward][status]++;
    }
    regard_close(library);
    for (int i = 0; i < 2; i++) printf("%d %d %d\n", found[i][0], found[i][1], found[i][2]);
    return 0;
}
