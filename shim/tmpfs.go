package shim

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/stasis-containers/stasis/pkg/restore"
)

// tmpfsDir is the directory of a bundle below which CRIU finds the tmpfs that the
// shim has made for it, during a restore.
const tmpfsDir = "tmpfs"

// mountTmpfs makes what the plan has of them, anew where an attempt to restore has
// left its own. The caller ends it with unmountTmpfs; what the container has of it
// stays.
func mountTmpfs(bundle string, plan *restore.Plan) error {
	if err := unmountTmpfs(bundle); err != nil {
		return err
	}
	for _, t := range plan.Tmpfs {
		dir := plan.CRIU.External[t.Key]
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return err
		}
		// On the node nothing in it is to be used; CRIU sets the flags of its own mount.
		if err := unix.Mount(t.Source, dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, t.Options); err != nil {
			return fmt.Errorf("mount tmpfs %s (%s): %w", t.Key, t.Options, err)
		}
		if err := t.Fill(dir); err != nil {
			return err
		}
	}
	return nil
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
