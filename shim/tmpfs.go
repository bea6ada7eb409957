package shim

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/stasis-containers/stasis/pkg/checkpoint/criu"
	"github.com/stasis-containers/stasis/pkg/restore"
)

// tmpfsDir is the directory of a bundle in which CRIU finds the tmpfs that the shim
// has made for it, during a restore.
const tmpfsDir = "tmpfs"

// tmpfsGuard keeps a mount from being made in a bundle that containerd is to remove.
type tmpfsGuard struct {
	sync.Mutex
	deleted bool
}

// mountTmpfs makes what the plan has of them; startInner unmounts them again, and
// what the container has of them stays. That it fails is no fault of the checkpoint.
func (c *container) mountTmpfs(plan *restore.Plan) error {
	c.tmpfs.Lock()
	defer c.tmpfs.Unlock()
	if c.tmpfs.deleted || len(plan.Tmpfs) == 0 {
		return nil // what is deleted cannot be started
	}
	err := os.Mkdir(filepath.Join(c.bundle, tmpfsDir), 0o700)
	for i := 0; err == nil && i < len(plan.Tmpfs); i++ {
		err = makeTmpfs(&plan.Tmpfs[i], plan.CRIU.External[plan.Tmpfs[i].Key])
	}
	if err != nil {
		err = errors.Join(err, unmountTmpfs(c.bundle))
		return &restore.Refusal{Code: restore.Internal, Err: fmt.Errorf("tmpfs: %w", err)}
	}
	return nil
}

func makeTmpfs(t *criu.Tmpfs, dir string) error {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	// On the node nothing in it is to be used; CRIU sets the flags of its own mount.
	if err := unix.Mount(t.Source, dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, t.Options); err != nil {
		return fmt.Errorf("mount %s (%s): %w", t.Key, t.Options, err)
	}
	return t.Fill(dir)
}

// endTmpfs unmounts what mountTmpfs has made, and for a container that is deleted
// sees to it that there will be nothing again.
func (c *container) endTmpfs(ctx context.Context, deleted bool) {
	c.tmpfs.Lock()
	defer c.tmpfs.Unlock()
	c.tmpfs.deleted = c.tmpfs.deleted || deleted
	if err := unmountTmpfs(c.bundle); err != nil {
		log.G(ctx).WithError(err).Error("unmount what was given to CRIU")
	}
}

// unmountTmpfs undoes mountTmpfs, also after a shim that died.
func unmountTmpfs(bundle string) error {
	dir := filepath.Join(bundle, tmpfsDir)
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		name := filepath.Join(dir, e.Name())
		errs = append(errs, unmount(name), os.Remove(name))
	}
	return errors.Join(append(errs, os.Remove(dir))...)
}
