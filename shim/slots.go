package shim

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
)

// acquireSlot takes one of n dump slots of the node and returns its release.
// Each pod has a shim of its own, so the slots are file locks; the kernel frees
// them with the process. It waits until ctx ends, then returns ErrBusy.
func acquireSlot(ctx context.Context, dir string, n int) (release func(), err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("dump slots: %w", err)
	}
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		for i := range n {
			name := filepath.Join(dir, "dump-slot-"+strconv.Itoa(i))
			f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
			if err != nil {
				return nil, fmt.Errorf("dump slots: %w", err)
			}
			err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
			if err == nil {
				return func() { f.Close() }, nil
			}
			f.Close()
			if !errors.Is(err, unix.EWOULDBLOCK) {
				return nil, fmt.Errorf("dump slots: lock %s: %w", name, err)
			}
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("all %d dump slots of the node are taken: %w", n, checkpoint.ErrBusy)
		case <-tick.C:
		}
	}
}
