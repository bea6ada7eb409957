package shim

import (
	"runtime/debug"
	"sync"
)

// restoreGCPercent lets the heap of a shim grow to 16 MiB before it is collected,
// ten times as far as by containerd's setting (40, for shims that idle). What a
// restore allocates fits in, and no processor time is taken from CRIU.
const restoreGCPercent = 400

var collecting struct {
	sync.Mutex
	less   int // how many restores want that
	before int // the percentage without them
}

// collectLess has garbage collected less often until done is called, which every
// caller must do once.
func collectLess() (done func()) {
	collecting.Lock()
	defer collecting.Unlock()
	if collecting.less++; collecting.less == 1 {
		collecting.before = debug.SetGCPercent(restoreGCPercent)
	}
	return func() {
		collecting.Lock()
		defer collecting.Unlock()
		if collecting.less--; collecting.less == 0 {
			debug.SetGCPercent(collecting.before)
		}
	}
}
