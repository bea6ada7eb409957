package shim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
	"github.com/stasis-containers/stasis/pkg/checkpoint/criu"
	"github.com/stasis-containers/stasis/pkg/checkpoint/fsys"
	"github.com/stasis-containers/stasis/pkg/checkpoint/store"
	"github.com/stasis-containers/stasis/pkg/restore"
)

// A clone's memory may be mapped from the template's files, see
// [criu.MappedMemory]: nothing is copied, no pager is needed, and clones share what
// they do not write to. The kernel reads these files when a page is asked for and
// nobody can check it then. So they are checked as a whole before the first clone of
// a boot maps them, and never change afterwards. A template that is removed keeps
// its files for as long as clones have them mapped.
//
// A container that maps files of the node cannot be dumped.

const (
	// eagerMapped is why there is no pager for memory that is mapped.
	eagerMapped = "mapped"
	// eagerUnmapped is why there is none where a restore with mapped memory failed.
	eagerUnmapped = "it could not be mapped"
	// firstInherited is the least number of a descriptor that CRIU inherits: beyond
	// what runc and CRIU open themselves before they look at it.
	firstInherited = 512
	// prefetchDelay leaves the disk to what the first answers need: with an empty page
	// cache the first came after 0.7 s so, and after 1.3 s without.
	prefetchDelay = time.Second
	// prefetchBytes are asked for at a time, of what is not in the page cache.
	prefetchBytes = 4 << 20
	// readAhead is what the kernel reads at once of what it is told to read, at least.
	readAhead = 128 << 10
	// prefetchTimeout bounds the reading ahead; what is missing then is read when it
	// is asked for.
	prefetchTimeout = 5 * time.Minute
)

// unmappable says why the memory of a checkpoint is not to be mapped, whatever its images
// are and the kernel can do.
func unmappable(m *checkpoint.Manifest, c *container) error {
	switch {
	case m.Template == "":
		return errors.New("it goes on from a checkpoint of its own, not from a template")
	case c.settings.KeepsRecords():
		return fmt.Errorf("its policy is %s, and what is mapped cannot be dumped", c.settings.Policy)
	case restore.HasUserNamespace(c.spec):
		return errors.New("it has a user namespace")
	case confined(c.spec):
		// The kernel asks it for a file that is mapped, at each mprotect, too.
		return errors.New("its SELinux label or AppArmor profile may forbid a file of the node")
	case m.ResidentBytes() < minLazyBytes:
		return fmt.Errorf("its template has no more than %d MiB of memory", m.ResidentBytes()>>20)
	}
	return nil
}

// mapMemory makes a restore one that maps memory, or says why it cannot be.
func (s *service) mapMemory(c *container, p *pendingRestore) error {
	if err := unmappable(p.claim.Manifest(), c); err != nil {
		return err
	}
	tree, err := sealedTree(p.claim.Dir()) // Linux 5.12
	if err != nil {
		return err
	}
	unix.Close(tree)
	mapped, err := criu.OpenMappedMemory(filepath.Join(p.claim.Dir(), checkpoint.MappedDir))
	if err != nil {
		return err // what is damaged is found so by those who read it next
	}
	p.mapped, p.eager = mapped, eagerMapped
	p.record, p.checked = s.checkedBefore(p.claim)
	return nil
}

// layOutMapped makes the images of a template for clones whose memory is mapped, or
// records why there are none. A template without any is none the worse for other clones.
func layOutMapped(ctx context.Context, dir string) (took time.Duration, err error) {
	begin, mapped := time.Now(), filepath.Join(dir, checkpoint.MappedDir)
	lerr := criu.LayOutMapped(ctx, filepath.Join(dir, checkpoint.ImageDir), mapped)
	if ctx.Err() != nil {
		return 0, context.Cause(ctx)
	}
	if lerr != nil {
		log.G(ctx).WithError(lerr).Warn("the template is made without images for mapped memory")
		err = os.RemoveAll(mapped)
	}
	return time.Since(begin), err
}

// laidOut tells whether a template has what its clones need for mapped memory, or the
// reason why that cannot be.
func laidOut(m *checkpoint.Manifest) bool {
	return slices.ContainsFunc(m.Files, func(f checkpoint.File) bool {
		return f.Path == checkpoint.MappedDir+"/"+criu.MappedIndex
	})
}

// confined tells whether a security module has rules of its own for the container.
// containerd's default profile allows files that are no longer reached by a name.
func confined(spec *specs.Spec) bool {
	if spec.Process == nil {
		return false
	}
	switch spec.Process.ApparmorProfile {
	case "", "unconfined", "cri-containerd.apparmor.d":
		return spec.Process.SelinuxLabel != ""
	}
	return true
}

// giveMemory opens what is to be mapped, for CRIU to inherit, and tells CRIU of it.
// release closes it again.
//
// The descriptors have no close-on-exec, so that runc and CRIU have them by the same
// numbers; runc sets it on all of its descriptors before it starts a container or a
// process in one (libcontainer/container_linux.go, start), but not before CRIU.
func (c *container) giveMemory(p *pendingRestore) (release func(), err error) {
	var fds []int
	release = func() {
		for _, fd := range fds {
			unix.Close(fd)
		}
	}
	o := p.plan.CRIU
	o.InheritFD = map[string]int{}
	tree, err := sealedTree(filepath.Join(p.claim.Dir(), checkpoint.ImageDir))
	if err != nil {
		return nil, fmt.Errorf("map memory: %w", err)
	}
	defer unix.Close(tree)
	for _, f := range p.mapped.Files {
		for _, key := range f.Keys {
			fd, err := openInherited(tree, f.Name)
			if err != nil {
				release()
				return nil, fmt.Errorf("map memory: %w", err)
			}
			fds = append(fds, fd)
			o.InheritFD[key] = fd
		}
	}
	if err := c.writeCRIUConfig(o); err != nil {
		release()
		return nil, err
	}
	return release, nil
}

// sealedTree is a mount of a directory, for this process alone, that allows nothing
// but reading and executing. Who may open what a process has mapped
// (/proc/PID/map_files), as a privileged container may, cannot write to it, and code
// that a virtual machine has compiled can be mapped from a file system that is mounted
// noexec.
func sealedTree(dir string) (int, error) {
	tree, err := unix.OpenTree(unix.AT_FDCWD, dir, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_SYMLINK_NOFOLLOW)
	if err != nil {
		return -1, &os.PathError{Op: "open_tree", Path: dir, Err: err}
	}
	err = unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, &unix.MountAttr{
		Attr_set: unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV, Attr_clr: unix.MOUNT_ATTR_NOEXEC,
	})
	if err != nil {
		unix.Close(tree)
		return -1, &os.PathError{Op: "mount_setattr", Path: dir, Err: err}
	}
	return tree, nil
}

// openInherited opens a file of the directory such that programs which are started
// from now on inherit it.
func openInherited(dir int, name string) (int, error) {
	fd, err := unix.Openat(dir, name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: name, Err: err}
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return -1, &os.PathError{Op: "stat", Path: name, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return -1, fmt.Errorf("%s: not a regular file: %w", name, checkpoint.ErrCorrupt)
	}
	inherited, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD, firstInherited)
	if err != nil {
		return -1, &os.PathError{Op: "dup", Path: name, Err: err}
	}
	return inherited, nil
}

// checkedFile is a file as it was when its checksums were compared. Whoever writes to it
// changes some of this; what a disk gives back later is not noticed.
type checkedFile struct {
	Path  string `json:"path"`
	Dev   uint64 `json:"dev"`
	Inode uint64 `json:"inode"`
	Size  int64  `json:"size"`
	Mtime int64  `json:"mtime"` // ns, like Ctime
	Ctime int64  `json:"ctime"`
}

// checked is what is recorded of the version of a template that was checked last.
type checked struct {
	Boot    string        `json:"boot"`
	Version checkpoint.ID `json:"version"`
	Files   []checkedFile `json:"files"`
}

// checkedName is the file with the record of a template.
func (s *service) checkedName(m *checkpoint.Manifest) string {
	return filepath.Join(s.config.RuntimeDir, "checked", m.Identity.Namespace+"."+m.Template)
}

// memoryFiles are the claimed files that are mapped, and those needed for that, as they
// are now.
func memoryFiles(of claim) ([]checkedFile, error) {
	var out []checkedFile
	for _, f := range of.Manifest().Files {
		if f.Blocks == nil && !f.OfMapped() {
			continue
		}
		var st unix.Stat_t
		name := filepath.Join(of.Dir(), filepath.FromSlash(f.Path))
		if err := unix.Lstat(name, &st); err != nil {
			return nil, &os.PathError{Op: "stat", Path: name, Err: err}
		}
		out = append(out, checkedFile{f.Path, st.Dev, st.Ino, st.Size, st.Mtim.Nano(), st.Ctim.Nano()})
	}
	return out, nil
}

// checkedBefore tells whether the memory of the template was compared with its
// checksums since the node started, and has not changed. Where it was not, record
// has [service.noteChecked] say so from now on.
func (s *service) checkedBefore(of claim) (record []byte, before bool) {
	boot, err := checkpoint.BootID()
	if err != nil {
		return nil, false
	}
	files, err := memoryFiles(of)
	if err != nil {
		return nil, false // what is missing is missed when it is opened
	}
	record, err = json.Marshal(checked{boot, of.ID(), files})
	if err != nil {
		return nil, false
	}
	have, err := os.ReadFile(s.checkedName(of.Manifest()))
	return record, err == nil && string(have) == string(record)
}

// noteChecked records what [claim.Verify] has compared; record is of the time
// before. A later change of the files is found by their times.
func (s *service) noteChecked(ctx context.Context, of claim, record []byte) {
	if record == nil {
		return
	}
	if err := fsys.Replace(s.checkedName(of.Manifest()), record); err != nil {
		log.G(ctx).WithError(err).Warn("the next clone compares the checksums of its memory once more")
	}
}

// noteTemplate records that a template which this shim has made is as its checksums
// say: they are of what was read back from its files.
func (s *service) noteTemplate(ctx context.Context, c *container, template string, version checkpoint.ID) {
	st, err := s.openStore()
	if err == nil {
		var pin *store.Pin
		if pin, err = st.PinTemplate(ctx, store.TemplateRef{Namespace: c.identity.Namespace, Name: template, Version: version}, c.id); err == nil {
			record, _ := s.checkedBefore(pin)
			s.noteChecked(ctx, pin, record)
			err = pin.Release(context.WithoutCancel(ctx))
		}
	}
	if err != nil {
		log.G(ctx).WithError(err).Warn("the first clone compares the checksums of its memory")
	}
}

// prefetch reads what is mapped into the page cache, as far as it is not there. The
// files are there for as long as the template is.
func (s *service) prefetch(ctx context.Context, p *pendingRestore) {
	ctx, cancel := context.WithTimeout(log.WithLogger(s.ctx, log.G(ctx)), prefetchTimeout)
	defer cancel()
	select {
	case <-time.After(prefetchDelay):
	case <-ctx.Done():
		return
	}
	for _, f := range p.mapped.Files {
		if err := prefetchFile(ctx, filepath.Join(p.claim.Dir(), checkpoint.ImageDir, f.Name)); err != nil {
			log.G(ctx).WithError(err).Debug("memory is read when it is asked for")
		}
	}
}

// prefetchFile has the kernel read a file ahead, a piece or two at a time, so that who
// asks for a page meanwhile hardly waits for what was asked for before.
func prefetchFile(ctx context.Context, name string) error {
	f, err := os.OpenFile(name, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	last := int64(-1) // byte of the piece that was asked for last
	for off := int64(0); off < fi.Size(); off += prefetchBytes {
		if err := ctx.Err(); err != nil {
			return err
		}
		end := min(off+prefetchBytes, fi.Size())
		// Linux 6.5; without it all is asked for, which costs a look at each page.
		var stat unix.Cachestat_t
		err := unix.Cachestat(uint(f.Fd()), &unix.CachestatRange{Off: uint64(off), Len: uint64(end - off)}, &stat, 0)
		if err == nil && stat.Cache*uint64(os.Getpagesize()) >= uint64(end-off) {
			continue
		}
		for at := off; at < end; at += readAhead {
			if err := unix.Fadvise(int(f.Fd()), at, min(readAhead, end-at), unix.FADV_WILLNEED); err != nil {
				return err
			}
		}
		if last >= 0 { // waits until it is there
			if _, err := f.ReadAt(make([]byte, 1), last); err != nil {
				return err
			}
		}
		last = end - 1
	}
	return nil
}

// unmap lays out a restore whose memory could not be mapped once more, for CRIU to
// read it.
func (p *pendingRestore) unmap(ctx context.Context, cause error) error {
	p.unmapped = fmt.Sprintf("a restore with mapped memory failed: %v", cause)
	log.G(ctx).WithField("reason", p.unmapped).Warn("restore without mapped memory")
	p.mapped, p.request.Mapped, p.eager = nil, nil, eagerUnmapped
	if err := p.removeImages(); err != nil {
		return err
	}
	plan, err := restore.Prepare(ctx, p.request)
	if err != nil {
		return err
	}
	p.plan = plan
	return nil
}

// dumpableLocked says why a container cannot be dumped, whoever asks for it.
func (c *container) dumpableLocked() error {
	if !c.mapped {
		return nil
	}
	return fmt.Errorf("its memory is mapped from template %s, which CRIU cannot dump; without %s: %s it could be: %w",
		c.settings.Template, checkpoint.AnnotationMemory, checkpoint.MemoryMapped, errdefs.ErrFailedPrecondition)
}
