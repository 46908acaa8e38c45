/* Stands in for libcuda.so.1 and for libamdhip64.so: takes images for modules, and hands launches to the tests. */
#include <string.h>

struct function {
    int module;
    const char *name;
    int shared;
};

typedef int (*launch_callback)(int module, const char *name, unsigned programs, unsigned threads, unsigned shared,
                               void *stream, void **parameters);

static launch_callback callback;
static struct function functions[64];
static int modules[64]; /* a module's handle is the address of its number here */
static int most_shared = 227 * 1024;
static int module_count, function_count, refused, loaded, failing_launch;

void fake_driver(launch_callback launch, int refused_images, int launch_error) {
    callback = launch;
    refused = refused_images;
    failing_launch = launch_error;
    module_count = function_count = 0;
}

void fake_shared(int most) { most_shared = most; }

int fake_loaded(void) { return loaded; }

static int load(void **module, const void *image) {
    if (memcmp(image, "\177ELF", 4) != 0) return 200;
    if (refused > 0) return refused--, 209;
    modules[module_count] = module_count;
    *module = &modules[module_count++];
    loaded++;
    return 0;
}

static int unload(void *module) {
    (void)module;
    loaded--;
    return 0;
}

static int function(void **found, void *module, const char *name) {
    functions[function_count] = (struct function){*(int *)module, name, 48 * 1024};
    *found = &functions[function_count++];
    return 0;
}

static int launch(void *found, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned block_y, unsigned block_z,
                  unsigned shared, void *stream, void **parameters, void **extra) {
    struct function *asked = found;
    if (failing_launch) return failing_launch;
    if (y != 1 || z != 1 || block_y != 1 || block_z != 1 || extra || (int)shared > asked->shared) return 1;
    return callback(asked->module, asked->name, x, threads, shared, stream, parameters);
}

#define LAUNCH                                                                                              \
    (void *found, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned block_y, unsigned block_z, \
     unsigned shared, void *stream, void **parameters, void **extra) {                                      \
        return launch(found, x, y, z, threads, block_y, block_z, shared, stream, parameters, extra);        \
    }

int cuInit(unsigned flags) { return (int)flags; }
int cuModuleLoadData(void **module, const void *image) { return load(module, image); }
int cuModuleUnload(void *module) { return unload(module); }
int cuModuleGetFunction(void **found, void *module, const char *name) { return function(found, module, name); }
int cuFuncSetAttribute(void *found, int attribute, int value) {
    if (attribute != 8 || value > most_shared) return 1;
    ((struct function *)found)->shared = value;
    return 0;
}
int cuLaunchKernel LAUNCH int cuGetErrorString(int error, const char **text) {
    *text = error == 1 ? "invalid argument" : "something else";
    return 0;
}

int hipModuleLoadData(void **module, const void *image) { return load(module, image); }
int hipModuleUnload(void *module) { return unload(module); }
int hipModuleGetFunction(void **found, void *module, const char *name) { return function(found, module, name); }
int hipModuleLaunchKernel LAUNCH int hipGetLastError(void) { return 0; }
const char *hipGetErrorString(int error) { return error == 1 ? "hipErrorInvalidValue" : "something else"; }
