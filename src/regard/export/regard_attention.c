/* Checks a call, picks its kernel, launches it: see regard_attention.h. */
#include "regard_attention.h"

#include <dlfcn.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* A compiled kernel, what calls it serves, and how it is launched. */
struct kernel {
    const char *arch;
    int step; /* of the forward, or of the backward */
    int dtype, head_dim, head_dim_v;
    unsigned features;  /* exactly those that a call has */
    int strides_of;     /* what strides of q, k, v and out are multiples of */
    int64_t most_bytes; /* that a tensor may span; 0 is any that 64-bit offsets reach */
    int rows;           /* queries of one program, or keys in the step that is of keys */
    unsigned threads, shared;
    const char *name;
    const unsigned char *image;
    const unsigned char *slots; /* where each of its parameters is found */
    int slot_count;
};

#include "regard_kernels.h" /* of `regard export` */

enum { KERNEL_COUNT = sizeof kernels / sizeof *kernels, FEATURE_COUNT = sizeof feature_names / sizeof *feature_names };

union value {
    const void *pointer;
    int64_t i64;
    int32_t i32;
    float fp32;
};

/* What a thread's calls of the driver go to, until it makes another one current. */
#if REGARD_HIP
typedef int place; /* a device; 0 in a thread that has chosen none */
#define PLACE "device"
#else
typedef void *place; /* a context; null in a thread that has made none current */
#define PLACE "context"
#endif

/* The functions of libcuda, or of libamdhip64, that this needs: all but the last have the same arguments in both. */
struct driver {
    int (*current)(place *found);
    int (*make_current)(place wanted);
    int (*load)(void **module, const void *image);
    int (*unload)(void *module);
    int (*function)(void **function, void *module, const char *name);
    int (*launch)(void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                  unsigned block_z, unsigned shared, void *stream, void **parameters, void **extra);
#if REGARD_HIP
    const char *(*error_string)(int error);
    int (*take_error)(void); /* out of the thread's state, where it would await the caller's own next look */
#else
    int (*initialize)(unsigned flags);
    int (*set_attribute)(void *function, int attribute, int value);
    int (*error_string)(int error, const char **text);
#endif
};

struct regard_library {
    struct driver driver;
    place place; /* of the modules */
    const char *arch;
    void *modules[KERNEL_COUNT]; /* null where a kernel is for another architecture */
    void *functions[KERNEL_COUNT];
};

static _Thread_local char last_error[1024];

static int refuse(int status, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(last_error, sizeof last_error, format, arguments);
    va_end(arguments);
    return status;
}

#define NEEDS(holds, ...)                                         \
    do {                                                          \
        if (!(holds)) return refuse(REGARD_INVALID, __VA_ARGS__); \
    } while (0)

const char *regard_last_error(void) { return last_error; }

const char *regard_description(void) { return description; }

/* --- the driver */

static int driver_error(const struct driver *driver, const char *what, int error) {
    const char *text = NULL;
#if REGARD_HIP
    text = driver->error_string(error);
#else
    driver->error_string(error, &text);
#endif
    return refuse(REGARD_DRIVER, "%s: error %d of the driver, %s", what, error,
                  text ? text : "which it has no text for");
}

static int find_driver(struct driver *driver) {
#if REGARD_HIP
    static const char *const files[] = {"libamdhip64.so", "libamdhip64.so.7", "libamdhip64.so.6"};
#else
    static const char *const files[] = {"libcuda.so.1", "libcuda.so"};
#endif
    struct {
        const char *name;
        void *address;
    } wanted[] = {
#if REGARD_HIP
        {"hipGetDevice", &driver->current},           {"hipSetDevice", &driver->make_current},
        {"hipModuleLoadData", &driver->load},         {"hipModuleUnload", &driver->unload},
        {"hipModuleGetFunction", &driver->function},  {"hipModuleLaunchKernel", &driver->launch},
        {"hipGetErrorString", &driver->error_string}, {"hipGetLastError", &driver->take_error},
#else
        {"cuCtxGetCurrent", &driver->current},
        {"cuCtxSetCurrent", &driver->make_current},
        {"cuModuleLoadData", &driver->load},
        {"cuModuleUnload", &driver->unload},
        {"cuModuleGetFunction", &driver->function},
        {"cuLaunchKernel", &driver->launch},
        {"cuGetErrorString", &driver->error_string},
        {"cuInit", &driver->initialize},
        {"cuFuncSetAttribute", &driver->set_attribute},
#endif
    };
    void *file = NULL;
    for (size_t i = 0; file == NULL && i < sizeof files / sizeof *files; i++)
        file = dlopen(files[i], RTLD_NOW | RTLD_LOCAL);
    if (file == NULL) return refuse(REGARD_DRIVER, "%s: not found, or not loaded: %s", files[0], dlerror());
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
        void *found = dlsym(file, wanted[i].name);
        if (found == NULL) return refuse(REGARD_DRIVER, "%s: has no %s", files[0], wanted[i].name);
        memcpy(wanted[i].address, &found, sizeof found); /* ISO C has no cast from an object's address to a function's */
    }
    return REGARD_OK;
}

/* Make a library's place current where another is, which `leave` is to be told. */
static int enter(const regard_library *library, place *before) {
    int error = library->driver.current(before);
    if (!error && *before != library->place) error = library->driver.make_current(library->place);
    return error ? driver_error(&library->driver, "entering the library's " PLACE, error) : REGARD_OK;
}

/* Make current again what was before `enter`. Takes the status of what came in between, and returns it if it failed. */
static int leave(const regard_library *library, place before, int status) {
    if (before == library->place) return status;
    int error = library->driver.make_current(before);
    return error && !status ? driver_error(&library->driver, "going back to the thread's " PLACE, error) : status;
}

/* Whether an error says that a kernel is for another device. */
static int is_of_another_device(int error) {
    enum { INVALID_IMAGE = 200, NO_BINARY_FOR_GPU = 209 };
    return error == INVALID_IMAGE || error == NO_BINARY_FOR_GPU;
}

static int load_kernel(regard_library *library, int index) {
    const struct kernel *kernel = &kernels[index];
    const struct driver *driver = &library->driver;
    int error = driver->function(&library->functions[index], library->modules[index], kernel->name);
    if (error) return driver_error(driver, kernel->name, error);
#if !REGARD_HIP
    enum { MAX_DYNAMIC_SHARED_SIZE_BYTES = 8 };
    error = driver->set_attribute(library->functions[index], MAX_DYNAMIC_SHARED_SIZE_BYTES, (int)kernel->shared);
    if (error == 1) { /* invalid value: more than this device has, where a larger one of its generation has enough */
        library->functions[index] = NULL;
        return REGARD_OK;
    }
    if (error) {
        char what[64];
        snprintf(what, sizeof what, "%u bytes of shared memory for a kernel of %s", kernel->shared, kernel->arch);
        return driver_error(driver, what, error);
    }
#endif
    return REGARD_OK;
}

/* The kernels of the first architecture that the device takes one of. */
static int load_kernels(regard_library *library) {
    const struct driver *driver = &library->driver;
    const char *refused = "";
    int why = 0;
    for (int i = 0; i < KERNEL_COUNT; i++) {
        const char *arch = kernels[i].arch;
        if (strcmp(arch, refused) == 0 || (library->arch != NULL && strcmp(arch, library->arch) != 0)) continue;
        int error = driver->load(&library->modules[i], kernels[i].image);
        if (error && library->arch == NULL && is_of_another_device(error)) {
            library->modules[i] = NULL;
            refused = arch;
            why = error;
#if REGARD_HIP
            driver->take_error();
#endif
            continue;
        }
        if (error) {
            library->modules[i] = NULL;
            return driver_error(driver, "loading a kernel", error);
        }
        library->arch = arch;
        int status = load_kernel(library, i);
        if (status) return status;
    }
    if (library->arch == NULL)
        return refuse(REGARD_UNSUPPORTED,
                      "arch: no kernel is for this device, or its driver is older than what compiled them (its error "
                      "%d); needs one of %s",
                      why, architectures);
    return REGARD_OK;
}

/* The calling thread's place is the library's. */
static int settle(regard_library *library) {
    const struct driver *driver = &library->driver;
#if !REGARD_HIP
    int failed = driver->initialize(0);
    if (failed) return driver_error(driver, "cuInit", failed);
#endif
    int error = driver->current(&library->place);
    if (error) return driver_error(driver, "asking for the current " PLACE, error);
#if !REGARD_HIP
    if (library->place == NULL)
        return refuse(REGARD_DRIVER, "context: got none that is current in this thread, needs one: cudaSetDevice, and "
                                     "before CUDA 12 cudaFree(NULL), or cuCtxSetCurrent");
#endif
    return REGARD_OK;
}

int regard_open(regard_library **library) {
    NEEDS(library != NULL, "library: got null, needs where to put the library");
    *library = NULL;
    regard_library *opened = calloc(1, sizeof *opened);
    if (opened == NULL) return refuse(REGARD_DRIVER, "library: out of memory");
    int status = find_driver(&opened->driver);
    if (!status) status = settle(opened);
    if (!status) status = load_kernels(opened);
    if (status) {
        regard_close(opened);
    } else {
        *library = opened;
    }
    return status;
}

void regard_close(regard_library *library) {
    if (library == NULL) return;
    place before;
    int loaded = 0;
    for (int i = 0; i < KERNEL_COUNT; i++) loaded |= library->modules[i] != NULL;
    if (loaded && enter(library, &before) == REGARD_OK) { /* else its context is gone, and the modules with it */
        for (int i = 0; i < KERNEL_COUNT; i++) {
            if (library->modules[i] != NULL) library->driver.unload(library->modules[i]);
        }
        leave(library, before, REGARD_OK);
    }
    free(library);
}

/* --- what a call is */

void regard_attention_args_init(regard_attention_args *args) {
    if (args == NULL) return;
    memset(args, 0, sizeof *args);
    args->struct_size = sizeof *args;
    args->window_left = args->window_right = -1;
    args->batch = args->seqlen_q = args->seqlen_k = args->total_q = args->total_k = -1;
    args->block_table_stride = -1;
    int64_t *const strides[] = {args->q_strides,   args->k_strides,    args->v_strides,
                                args->out_strides, args->mask_strides, args->bias_strides};
    for (size_t i = 0; i < sizeof strides / sizeof *strides; i++) strides[i][0] = strides[i][1] = strides[i][2] = -1;
}

static unsigned features_of(const regard_attention_args *args) {
    unsigned features = 0;
    if (args->window_left >= 0) {
        features |= FEATURE_window;
    } else if (args->causal || args->window_right >= 0) {
        features |= FEATURE_causal;
    }
    if (args->mask) features |= FEATURE_mask;
    if (args->bias) features |= FEATURE_bias;
    if (args->softcap > 0) features |= FEATURE_softcap;
    if (args->alibi_slopes) features |= FEATURE_alibi;
    if (args->sinks) features |= FEATURE_sinks;
    if (args->cu_seqlens_q) features |= FEATURE_varlen;
    if (args->block_table) {
        features |= FEATURE_paged;
    } else if (args->kv_lens) {
        features |= FEATURE_kv_lens;
    }
    return features;
}

/* A kernel's or a call's kind in words: "float16 head_dim 128 causal sinks". */
static void describe(char *text, size_t size, int dtype, int head_dim, int head_dim_v, unsigned features) {
    int length = snprintf(text, size, "%s head_dim %d", dtype_names[dtype], head_dim);
    if (head_dim_v != head_dim) length += snprintf(text + length, size - (size_t)length, " head_dim_v %d", head_dim_v);
    for (int i = 0; i < FEATURE_COUNT; i++) {
        if (features >> i & 1) length += snprintf(text + length, size - (size_t)length, " %s", feature_names[i]);
    }
}

static int dim_v_of(const regard_attention_args *args) { return args->head_dim_v ? args->head_dim_v : args->head_dim; }

static int find_kernel(const regard_library *library, const regard_attention_args *args, int step, int *index) {
    unsigned features = features_of(args);
    for (*index = 0; *index < KERNEL_COUNT; ++*index) {
        const struct kernel *kernel = &kernels[*index];
        if (library->functions[*index] != NULL && kernel->step == step && kernel->dtype == args->dtype &&
            kernel->head_dim == args->head_dim && kernel->head_dim_v == dim_v_of(args) && kernel->features == features)
            return REGARD_OK;
    }
    char wanted[192];
    describe(wanted, sizeof wanted, args->dtype, args->head_dim, dim_v_of(args), features);
    const char *pass = step == STEP_forward ? "call" : "backward", *separator = "";
    int length = snprintf(last_error, sizeof last_error, "kernel: got a %s of %s, needs one of", pass, wanted);
    for (int i = 0; i < KERNEL_COUNT && length < (int)sizeof last_error; i++) {
        if (library->functions[i] == NULL || kernels[i].step != step) continue;
        char kind[192];
        describe(kind, sizeof kind, kernels[i].dtype, kernels[i].head_dim, kernels[i].head_dim_v, kernels[i].features);
        length += snprintf(last_error + length, sizeof last_error - (size_t)length, "%s %s", separator, kind);
        separator = ",";
    }
    if (*separator == 0)
        return refuse(REGARD_UNSUPPORTED, "kernel: got a %s, needs a library with kernels for it", pass);
    return REGARD_UNSUPPORTED;
}

/* --- what is wrong with a call */

/* The kernels' 32-bit numbers of rows go some blocks past the last. */
enum { MOST_ROWS = INT32_MAX - 1024 };

static int check_sizes(const regard_attention_args *args) {
    NEEDS(args->struct_size == sizeof *args, "struct_size: got %zu, needs %zu: call regard_attention_args_init",
          args->struct_size, sizeof *args);
    NEEDS(args->dtype >= REGARD_FLOAT16 && args->dtype <= REGARD_FLOAT32, "dtype: got %d, needs REGARD_FLOAT16, ...",
          args->dtype);
    NEEDS(args->batch >= 0, "batch: got %d, needs at least 0", args->batch);
    NEEDS(args->seqlen_q >= 0, "seqlen_q: got %d, needs at least 0", args->seqlen_q);
    NEEDS(args->seqlen_k >= 0, "seqlen_k: got %d, needs at least 0", args->seqlen_k);
    NEEDS(args->heads_q > 0, "heads_q: got %d, needs at least 1", args->heads_q);
    NEEDS(args->heads_kv > 0 && args->heads_q % args->heads_kv == 0, "heads_kv: got %d, needs a divisor of heads_q %d",
          args->heads_kv, args->heads_q);
    NEEDS(args->head_dim > 0, "head_dim: got %d, needs at least 1", args->head_dim);
    NEEDS(args->head_dim_v >= 0, "head_dim_v: got %d, needs at least 1, or 0 for head_dim", args->head_dim_v);
    NEEDS((int64_t)args->seqlen_q + args->seqlen_k <= MOST_ROWS,
          "seqlen_q, seqlen_k: got %d and %d, needs at most %d together", args->seqlen_q, args->seqlen_k, MOST_ROWS);
    return REGARD_OK;
}

static int check_semantics(const regard_attention_args *args) {
    float most = greatest_softcaps[args->dtype];
    NEEDS(isfinite(args->softmax_scale) && args->softmax_scale >= 0,
          "softmax_scale: got %g, needs a positive number, or 0 for head_dim ** -0.5", (double)args->softmax_scale);
    NEEDS(args->softcap == 0 || (args->softcap >= least_softcap && args->softcap <= most),
          "softcap: got %g, needs 0 or %g to %g", (double)args->softcap, (double)least_softcap, (double)most);
    NEEDS(args->window_left >= -1, "window_left: got %d, needs at least 0, or -1 for no limit", args->window_left);
    NEEDS(args->window_right >= -1, "window_right: got %d, needs at least 0, or -1 for no limit", args->window_right);
    NEEDS(!args->cu_seqlens_q == !args->cu_seqlens_k, "cu_seqlens_q, cu_seqlens_k: got one, needs both or neither");
    if (args->cu_seqlens_q) {
        NEEDS(!args->kv_lens && !args->block_table,
              "kv_lens, block_table: got one together with cu_seqlens, needs one or the other");
        NEEDS(!args->mask && !args->bias, "mask, bias: got one together with cu_seqlens, needs none");
        NEEDS(args->total_q >= 0 && args->total_q <= MOST_ROWS, "total_q: got %d, needs 0 to %d", args->total_q,
              MOST_ROWS);
        NEEDS(args->total_k >= 0 && args->total_k <= MOST_ROWS, "total_k: got %d, needs 0 to %d", args->total_k,
              MOST_ROWS);
        NEEDS(args->seqlen_q > 0 || args->total_q == 0, "seqlen_q: got 0 of %d packed rows, needs the longest sequence",
              args->total_q);
        NEEDS(args->seqlen_k > 0 || args->total_k == 0, "seqlen_k: got 0 of %d packed rows, needs the longest sequence",
              args->total_k);
    }
    if (args->block_table) {
        NEEDS(args->kv_lens, "kv_lens: got null, needs the lengths of sequences in pages");
        NEEDS(args->page_size > 0, "page_size: got %d, needs at least 1", args->page_size);
        NEEDS(args->num_pages > 0, "num_pages: got %d, needs at least 1", args->num_pages);
        NEEDS(args->block_table_stride >= 0, "block_table_stride: got %lld, needs at least 0",
              (long long)args->block_table_stride);
    }
    NEEDS(args->alibi_batch_stride >= 0, "alibi_batch_stride: got %lld, needs at least 0",
          (long long)args->alibi_batch_stride);
    return REGARD_OK;
}

/* A tensor of (batch, rows, heads, row_length) with the first three strides. */
struct layout {
    const char *name;
    const void *address;
    const int64_t *strides;
    int64_t batch, rows, heads, row_length;
    int strides_of; /* what strides are multiples of */
    int row;        /* which of them is the rows' */
    int itemsize;
    int64_t least_stride; /* of what is written the row's length, or rows would overlap */
};

/* Rows further apart would take 32-bit offsets inside a tile too far. */
enum { MOST_ROW_STRIDE = INT32_MAX / 256 - 1 };

static int check_address(const char *name, const void *address, unsigned multiple) {
    unsigned past = (unsigned)((uintptr_t)address % multiple);
    NEEDS(past == 0, "%s: got an address %u past a multiple of %u, needs a multiple", name, past, multiple);
    return REGARD_OK;
}

static int check_span(const char *name, double bytes, int64_t most_bytes) {
    double most = most_bytes ? (double)most_bytes : 0x1p62;
    if (bytes <= most) return REGARD_OK;
    return refuse(REGARD_UNSUPPORTED, "%s: got %.0f bytes from its first to its last element, needs at most %.0f", name,
                  bytes, most);
}

static int check_layout(const struct layout *tensor, int64_t most_bytes) {
    if (tensor->batch == 0 || tensor->rows == 0 || tensor->row_length == 0) return REGARD_OK; /* nothing is touched */
    NEEDS(tensor->address != NULL, "%s: got null, needs an address", tensor->name);
    int status = check_address(tensor->name, tensor->address, 16);
    if (status) return status;
    const int64_t sizes[] = {tensor->batch, tensor->row == 1 ? tensor->rows : tensor->heads,
                             tensor->row == 1 ? tensor->heads : tensor->rows};
    double bytes = (double)(tensor->row_length * tensor->itemsize);
    for (int i = 0; i < 3; i++) {
        long long stride = tensor->strides[i];
        if (sizes[i] < 2) continue;
        NEEDS(stride >= tensor->least_stride, "%s_strides[%d]: got %lld, needs at least %lld", tensor->name, i, stride,
              (long long)tensor->least_stride);
        NEEDS(stride % tensor->strides_of == 0, "%s_strides[%d]: got %lld, needs a multiple of %d", tensor->name, i,
              stride, tensor->strides_of);
        NEEDS(i != tensor->row || stride <= MOST_ROW_STRIDE, "%s_strides[%d]: got %lld, needs at most %d", tensor->name,
              i, stride, MOST_ROW_STRIDE);
        bytes += (double)(sizes[i] - 1) * (double)stride * tensor->itemsize;
    }
    return check_span(tensor->name, bytes, most_bytes);
}

/* Numbers of 32 bits, of which the last is the count's. */
struct array {
    const char *name;
    const void *address; /* or null, where it may be */
    double count;
    int64_t most_bytes;
};

static int check_arrays(const struct array *arrays, int count) {
    int status = REGARD_OK;
    for (int i = 0; !status && i < count; i++) {
        if (arrays[i].address == NULL) continue;
        status = check_address(arrays[i].name, arrays[i].address, 4);
        if (!status) status = check_span(arrays[i].name, 4 * arrays[i].count, arrays[i].most_bytes);
    }
    return status;
}

static int itemsize_of(int dtype) { return dtype == REGARD_FLOAT32 ? 4 : 2; }

static int check_layouts(const struct layout *tensors, int count, const struct kernel *kernel) {
    int status = REGARD_OK;
    for (int i = 0; !status && i < count; i++) status = check_layout(&tensors[i], kernel->most_bytes);
    return status;
}

/* Rows and batch entries of queries and of keys, as they lie in memory. */
struct extent {
    int64_t batch, rows, pages, keys;
};

static struct extent extent_of(const regard_attention_args *args) {
    if (args->cu_seqlens_q) return (struct extent){1, args->total_q, 1, args->total_k};
    if (args->block_table) return (struct extent){args->batch, args->seqlen_q, args->num_pages, args->page_size};
    return (struct extent){args->batch, args->seqlen_q, args->batch, args->seqlen_k};
}

/* The elements of lse, and of each half of scratch. */
static double lse_size(const regard_attention_args *args) {
    struct extent is = extent_of(args);
    return (double)is.batch * (double)is.rows * args->heads_q;
}

/* How far the rows of a mask and bias are read. */
static int readable_keys(const regard_attention_args *args) { return (args->seqlen_k + 15) / 16 * 16; }

static int check_tensors(const regard_attention_args *args, const struct kernel *kernel) {
    struct extent is = extent_of(args);
    int of = kernel->strides_of, size = itemsize_of(args->dtype), dim = args->head_dim, dim_v = dim_v_of(args);
    int keys = readable_keys(args), heads = args->heads_q, heads_kv = args->heads_kv;
    const struct layout tensors[] = {
        {"q", args->q, args->q_strides, is.batch, is.rows, heads, dim, of, 1, size, 0},
        {"out", args->out, args->out_strides, is.batch, is.rows, heads, dim_v, of, 1, size, dim_v},
        {"k", args->k, args->k_strides, is.pages, is.keys, heads_kv, dim, of, 1, size, 0},
        {"v", args->v, args->v_strides, is.pages, is.keys, heads_kv, dim_v, of, 1, size, 0},
        {"mask", args->mask, args->mask_strides, args->mask ? is.batch : 0, is.rows, heads, keys, 16, 2, 1, 0},
        {"bias", args->bias, args->bias_strides, args->bias ? is.batch : 0, is.rows, heads, keys, 16, 2, size, 0},
    };
    double others = args->batch > 0 ? args->batch - 1 : 0;
    double pages = args->block_table ? args->seqlen_k / args->page_size + 1 : 0;
    const struct array arrays[] = {
        {"lse", args->lse, lse_size(args), 0},
        {"alibi_slopes", args->alibi_slopes, others * (double)args->alibi_batch_stride + heads, 0},
        {"sinks", args->sinks, heads, 0},
        {"cu_seqlens_q", args->cu_seqlens_q, others + 2, 0},
        {"cu_seqlens_k", args->cu_seqlens_k, others + 2, 0},
        {"kv_lens", args->kv_lens, others + 1, 0},
        {"block_table", args->block_table, others * (double)args->block_table_stride + pages, kernel->most_bytes},
    };
    NEEDS(args->lse != NULL || is.batch == 0 || is.rows == 0, "lse: got null, needs an address");
    int status = check_layouts(tensors, sizeof tensors / sizeof *tensors, kernel);
    return status ? status : check_arrays(arrays, sizeof arrays / sizeof *arrays);
}

static int check_grads(const regard_attention_args *args, const regard_attention_grads *grads,
                       const struct kernel *kernel) {
    struct extent is = extent_of(args);
    int of = kernel->strides_of, size = itemsize_of(args->dtype), dim = args->head_dim, dim_v = dim_v_of(args);
    int heads = args->heads_q, heads_kv = args->heads_kv;
    NEEDS(grads != NULL, "grads: got null, needs the gradients of a call");
    NEEDS(grads->struct_size == sizeof *grads, "grads.struct_size: got %zu, needs %zu", grads->struct_size,
          sizeof *grads);
    const struct layout tensors[] = {
        {"grad_out", grads->grad_out, grads->grad_out_strides, is.batch, is.rows, heads, dim_v, of, 1, size, 0},
        {"dq", grads->dq, grads->dq_strides, is.batch, is.rows, heads, dim, of, 1, size, dim},
        {"dk", grads->dk, grads->dk_strides, is.pages, is.keys, heads_kv, dim, of, 1, size, dim},
        {"dv", grads->dv, grads->dv_strides, is.pages, is.keys, heads_kv, dim_v, of, 1, size, dim_v},
    };
    const struct array scratch = {"scratch", grads->scratch, 2 * lse_size(args), 0};
    NEEDS(grads->scratch != NULL || is.batch == 0 || is.rows == 0, "scratch: got null, needs an address");
    int status = check_layouts(tensors, sizeof tensors / sizeof *tensors, kernel);
    return status ? status : check_arrays(&scratch, 1);
}

/* The number of programs of a launch; 0 where there is nothing to write. */
static int64_t programs_of(const regard_attention_args *args, const struct kernel *kernel) {
    struct extent is = extent_of(args);
    int of_keys = kernel->step == STEP_keys;
    if ((of_keys ? is.keys : is.rows) == 0) return 0;
    int64_t rows = of_keys ? args->seqlen_k : kernel->step == STEP_row_terms ? is.rows : args->seqlen_q;
    int64_t heads =
        (kernel->step == STEP_row_terms ? is.batch : args->batch) * (of_keys ? args->heads_kv : args->heads_q);
    return (rows + kernel->rows - 1) / kernel->rows * heads;
}

/* Check all of a call but its tensors. */
static int check_call(const regard_library *library, const regard_attention_args *args) {
    NEEDS(library != NULL, "library: got null, needs one that regard_open made");
    NEEDS(args != NULL, "args: got null, needs a call");
    int status = check_sizes(args);
    return status ? status : check_semantics(args);
}

/* Find the kernel of a step, whose blocks must fit a launch. */
static int choose_kernel(const regard_library *library, const regard_attention_args *args, int step, int *index) {
    int status = find_kernel(library, args, step, index);
    if (status) return status;
    const struct kernel *kernel = &kernels[*index];
    int64_t most = REGARD_HIP ? UINT32_MAX / kernel->threads : INT32_MAX; /* HIP counts the threads of a launch */
    NEEDS(args->batch <= INT32_MAX / args->heads_q && programs_of(args, kernel) <= most,
          "batch, heads_q, seqlen_q: got %d, %d and %d, needs at most %lld blocks of %d rows", args->batch,
          args->heads_q, args->seqlen_q, (long long)most, kernel->rows);
    return REGARD_OK;
}

static int prepare_forward(const regard_library *library, const regard_attention_args *args, int *index) {
    int status = check_call(library, args);
    if (!status) status = choose_kernel(library, args, STEP_forward, index);
    if (status || programs_of(args, &kernels[*index]) == 0) return status;
    return check_tensors(args, &kernels[*index]);
}

int regard_attention_check(const regard_library *library, const regard_attention_args *args) {
    int index;
    return prepare_forward(library, args, &index);
}

/* --- launching it */

/* A side of the band that is no limit or further than all that there is, as which it bounds as little. */
static int32_t bounded(int32_t side, int32_t all) { return side < 0 || side > all ? all : side; }

static void fill_strides(union value *values, int first, const int64_t *strides, int packed) {
    values[first].i64 = packed ? 0 : strides[0];
    values[first + 1].i32 = (int32_t)strides[1];
    values[first + 2].i64 = strides[2];
}

static void fill_pair_strides(union value *values, int first, const int64_t *strides) {
    values[first].i64 = strides[0];
    values[first + 1].i64 = strides[1];
    values[first + 2].i32 = (int32_t)strides[2];
}

static void fill(const regard_attention_args *args, union value *values) {
    int packed = args->cu_seqlens_q != NULL;
    int64_t lse_row = extent_of(args).rows;

    values[SLOT_q_ptr].pointer = args->q;
    values[SLOT_k_ptr].pointer = args->k;
    values[SLOT_v_ptr].pointer = args->v;
    values[SLOT_out_ptr].pointer = args->out;
    values[SLOT_lse_ptr].pointer = args->lse;
    values[SLOT_mask_ptr].pointer = args->mask;
    values[SLOT_bias_ptr].pointer = args->bias;
    values[SLOT_alibi_ptr].pointer = args->alibi_slopes;
    values[SLOT_sinks_ptr].pointer = args->sinks;
    values[SLOT_cu_seqlens_q_ptr].pointer = args->cu_seqlens_q;
    values[SLOT_cu_seqlens_k_ptr].pointer = args->cu_seqlens_k;
    values[SLOT_kv_lens_ptr].pointer = args->kv_lens;
    values[SLOT_block_table_ptr].pointer = args->block_table;

    fill_strides(values, SLOT_q_strides_0, args->q_strides, packed);
    fill_strides(values, SLOT_k_strides_0, args->k_strides, packed);
    fill_strides(values, SLOT_v_strides_0, args->v_strides, packed);
    fill_strides(values, SLOT_out_strides_0, args->out_strides, packed);
    fill_pair_strides(values, SLOT_mask_strides_0, args->mask_strides);
    fill_pair_strides(values, SLOT_bias_strides_0, args->bias_strides);
    values[SLOT_lse_strides_0].i64 = packed ? 0 : lse_row * args->heads_q;
    values[SLOT_lse_strides_1].i64 = lse_row;
    values[SLOT_alibi_strides_0].i64 = args->alibi_batch_stride;
    values[SLOT_block_table_stride].i64 = args->block_table_stride;

    values[SLOT_heads_q].i32 = args->heads_q;
    values[SLOT_heads_kv].i32 = args->heads_kv;
    values[SLOT_group].i32 = args->heads_q / args->heads_kv;
    values[SLOT_seqlen_q].i32 = args->seqlen_q;
    values[SLOT_seqlen_k].i32 = args->seqlen_k;
    values[SLOT_total_q].i32 = args->total_q;
    values[SLOT_total_k].i32 = args->total_k;
    values[SLOT_rows].i32 = (int32_t)lse_row;
    values[SLOT_readable_k].i32 = readable_keys(args);
    values[SLOT_page_size].i32 = args->page_size;
    values[SLOT_softmax_scale].fp32 =
        args->softmax_scale > 0 ? args->softmax_scale : (float)(1 / sqrt((double)args->head_dim));
    values[SLOT_softcap].fp32 = args->softcap;
    values[SLOT_window_left].i32 = bounded(args->window_left, args->seqlen_k);
    values[SLOT_window_right].i32 = args->causal ? 0 : bounded(args->window_right, args->seqlen_q);
    values[SLOT_scratch].pointer = NULL;
}

static void fill_grads(const regard_attention_args *args, const regard_attention_grads *grads, union value *values) {
    int packed = args->cu_seqlens_q != NULL;
    struct extent is = extent_of(args);
    uintptr_t heads = (uintptr_t)args->heads_q;
    values[SLOT_grad_out_ptr].pointer = grads->grad_out;
    values[SLOT_dq_ptr].pointer = grads->dq;
    values[SLOT_dk_ptr].pointer = grads->dk;
    values[SLOT_dv_ptr].pointer = grads->dv;
    values[SLOT_row_lse_ptr].pointer = grads->scratch;
    uintptr_t second_half = (uintptr_t)grads->scratch + 4 * (uintptr_t)is.batch * (uintptr_t)is.rows * heads;
    values[SLOT_delta_ptr].pointer = (const void *)second_half;
    fill_strides(values, SLOT_grad_out_strides_0, grads->grad_out_strides, packed);
    fill_strides(values, SLOT_dq_strides_0, grads->dq_strides, packed);
    fill_strides(values, SLOT_dk_strides_0, grads->dk_strides, packed);
    fill_strides(values, SLOT_dv_strides_0, grads->dv_strides, packed);
}

static int launch(const regard_library *library, int index, const regard_attention_args *args, union value *values,
                  void *stream) {
    const struct kernel *kernel = &kernels[index];
    int64_t programs = programs_of(args, kernel);
    void *parameters[SLOT_COUNT + 2];
    if (programs == 0) return REGARD_OK;
    for (int i = 0; i < kernel->slot_count; i++) parameters[i] = &values[kernel->slots[i]];
    int error = library->driver.launch(library->functions[index], (unsigned)programs, 1, 1, kernel->threads, 1, 1,
                                       kernel->shared, stream, parameters, NULL);
    return error ? driver_error(&library->driver, "launching the kernel", error) : REGARD_OK;
}

static int launch_in_order(const regard_library *library, const int *indices, int count,
                           const regard_attention_args *args, union value *values, void *stream) {
    place before;
    int status = enter(library, &before);
    if (status) return status;
    for (int i = 0; !status && i < count; i++) status = launch(library, indices[i], args, values, stream);
    return leave(library, before, status);
}

int regard_attention_forward(const regard_library *library, const regard_attention_args *args, void *stream) {
    union value values[SLOT_COUNT];
    int index;
    int status = prepare_forward(library, args, &index);
    if (status) return status;
    fill(args, values);
    return launch_in_order(library, &index, 1, args, values, stream);
}

int regard_attention_backward(const regard_library *library, const regard_attention_args *args,
                              const regard_attention_grads *grads, void *stream) {
    static const int steps[] = {STEP_row_terms, STEP_keys, STEP_queries};
    enum { STEPS = sizeof steps / sizeof *steps };
    union value values[SLOT_COUNT];
    int index[STEPS], status = check_call(library, args);
    for (int i = 0; !status && i < STEPS; i++) status = choose_kernel(library, args, steps[i], &index[i]);
    if (!status) status = check_tensors(args, &kernels[index[0]]);
    if (!status) status = check_grads(args, grads, &kernels[index[0]]);
    if (status) return status;
    fill(args, values);
    fill_grads(args, grads, values);
    return launch_in_order(library, index, STEPS, args, values, stream);
}
