/* Stands in for libcuda.so.1 and for libamdhip64.so: takes images for modules, and hands launches to the tests. */
#include <stdint.h>
#include <string.h>

struct module {
    int number;
    int place; /* where it was loaded */
};

struct function {
    const struct module *module;
    const char *name;
    int shared;
};

typedef int (*launch_callback)(int module, const char *name, unsigned programs, unsigned threads, unsigned shared,
                               void *stream, void **parameters);

static launch_callback callback;
static struct function functions[64];
static struct module modules[64];
static int most_shared = 227 * 1024;
static int module_count, function_count, refused, loaded, failing_launch, failing_switch;
static _Thread_local int current; /* context, of which 0 is none, or device */
static _Thread_local int switches;

void fake_driver(launch_callback launch, int refused_images, int launch_error) {
    callback = launch;
    refused = refused_images;
    failing_launch = launch_error;
    module_count = function_count = 0;
    current = 1;
}

/* What is current in this thread from now on; the switch after so many of the library's own fails, or with 0 none. */
void fake_place(int place, int failing) {
    current = place;
    failing_switch = failing;
    switches = 0;
}

int fake_current(void) { return current; }

int fake_switches(void) { return switches; }

void fake_shared(int most) { most_shared = most; }

int fake_loaded(void) { return loaded; }

static int load(void **module, const void *image) {
    if (memcmp(image, "\177ELF", 4) != 0) return 200;
    if (refused > 0) return refused--, 209;
    modules[module_count] = (struct module){module_count, current};
    *module = &modules[module_count++];
    loaded++;
    return 0;
}

/* As a driver that is given a handle of another place. */
static int is_here(const struct module *module) { return module->place == current; }

static int unload(void *module) {
    if (!is_here(module)) return 201;
    loaded--;
    return 0;
}

static int function(void **found, void *module, const char *name) {
    functions[function_count] = (struct function){module, name, 48 * 1024};
    *found = &functions[function_count++];
    return 0;
}

static int launch(void *found, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned block_y, unsigned block_z,
                  unsigned shared, void *stream, void **parameters, void **extra) {
    struct function *asked = found;
    if (!is_here(asked->module)) return 201;
    if (failing_launch) return failing_launch;
    if (y != 1 || z != 1 || block_y != 1 || block_z != 1 || extra || (int)shared > asked->shared) return 1;
    return callback(asked->module->number, asked->name, x, threads, shared, stream, parameters);
}

static int switch_to(int place) {
    if (++switches == failing_switch) return 4;
    current = place;
    return 0;
}

#define LAUNCH                                                                                              \
    (void *found, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned block_y, unsigned block_z, \
     unsigned shared, void *stream, void **parameters, void **extra) {                                      \
        return launch(found, x, y, z, threads, block_y, block_z, shared, stream, parameters, extra);        \
    }

int cuInit(unsigned flags) { return (int)flags; }
int cuCtxGetCurrent(void **context) {
    *context = (void *)(uintptr_t)current;
    return 0;
}
int cuCtxSetCurrent(void *context) { return switch_to((int)(uintptr_t)context); }
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

int hipGetDevice(int *device) {
    *device = current;
    return 0;
}
int hipSetDevice(int device) { return switch_to(device); }
int hipModuleLoadData(void **module, const void *image) { return load(module, image); }
int hipModuleUnload(void *module) { return unload(module); }
int hipModuleGetFunction(void **found, void *module, const char *name) { return function(found, module, name); }
int hipModuleLaunchKernel LAUNCH int hipGetLastError(void) { return 0; }
const char *hipGetErrorString(int error) { return error == 1 ? "hipErrorInvalidValue" : "something else"; }
