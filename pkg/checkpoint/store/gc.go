package store

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
)

// SweepReport says what Sweep did.
type SweepReport struct {
	Stages   int             // removed
	Trash    int             // removed
	Released []checkpoint.ID // claims taken back from dead processes
}

// Sweep tidies up after processes that died: it removes their stages and what
// they were about to remove, takes back what they had claimed, and calls
// [Store.PruneTemplates]. It goes on
// after errors and returns them joined. What live processes work on it leaves.
func (s *Store) Sweep(ctx context.Context) (SweepReport, error) {
	var r SweepReport
	entries, err := s.fs.ReadDir(s.root)
	if err != nil {
		return r, fmt.Errorf("sweep: %w", err)
	}
	var errs []error
	for _, e := range entries {
		if ctx.Err() != nil {
			errs = append(errs, context.Cause(ctx))
			break
		}
		name, isOwner := strings.CutSuffix(e.Name(), ownerSuffix)
		p := s.path(name)
		switch {
		case strings.HasPrefix(name, trashPrefix):
			if err = s.fs.RemoveAll(s.path(e.Name())); err == nil {
				r.Trash++
			}
		case strings.HasPrefix(name, stagePrefix):
			var alive, removed bool
			if _, alive, err = s.owner(p + ownerSuffix); err != nil || alive {
				break
			}
			if !isOwner {
				err = s.fs.RemoveAll(p)
				removed = err == nil
			}
			if there, lerr := s.exists(p); err == nil && lerr == nil && !there {
				err = s.fs.Remove(p + ownerSuffix)
			}
			if errors.Is(err, fs.ErrNotExist) {
				err = nil
			}
			if removed {
				r.Stages++
			}
		}
		if err != nil {
			errs = append(errs, err)
			err = nil
		}
	}
	hashes, err := s.fs.ReadDir(s.path(claimedDir))
	if err != nil {
		errs = append(errs, err)
	}
	for _, h := range hashes {
		if len(h.Name()) != 16 || !h.IsDir() {
			continue // a stranger
		}
		released, err := s.releaseStale(ctx, h.Name())
		r.Released = append(r.Released, released...)
		if err != nil {
			errs = append(errs, err)
		}
		if err := s.sweepOwners(ctx, h.Name()); err != nil {
			errs = append(errs, err)
		}
	}
	if err := s.sweepTemplates(ctx); err != nil {
		errs = append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		return r, fmt.Errorf("sweep: %w", err)
	}
	return r, nil
}

// sweepOwners removes owner's files of an identity that no claim goes with.
func (s *Store) sweepOwners(ctx context.Context, hash string) error {
	dir := s.path(claimedDir, hash)
	entries, err := s.fs.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, e := range entries {
		name, isOwner := strings.CutSuffix(e.Name(), ownerSuffix)
		id, err := checkpoint.ParseID(name)
		if !isOwner || err != nil || id.IdentityHash() != hash {
			continue
		}
		l, err := s.lock(ctx, id)
		if err != nil {
			return err
		}
		if there, lerr := s.exists(s.claimedPath(id)); lerr == nil && !there {
			s.dropOwner(id)
		}
		l.Close()
	}
	return nil
}

// Policy says what GC removes. Zero values do not limit.
type Policy struct {
	// TTL is how long an unused checkpoint is kept.
	TTL time.Duration
	// MaxCount and MaxBytes bound the whole store, claimed ones not counted.
	MaxCount int
	MaxBytes int64
	// KeepPerIdentity is how many committed checkpoints of one identity are kept.
	KeepPerIdentity int
	// DeadPodUIDs reports that a pod is gone for good. It is asked only about
	// pods whose UID is the key of the identity, for others may come back.
	DeadPodUIDs func(uid string) bool
}

// Removal is a checkpoint that GC removed, or would remove.
type Removal struct {
	ID        checkpoint.ID
	Identity  checkpoint.Identity // empty if the manifest cannot be read
	SizeBytes int64
	Reason    string
}

// GC removes checkpoints by policy, never claimed ones. With dryRun it removes
// nothing and only tells. To come below MaxCount and MaxBytes it removes first
// what is quarantined or corrupt, then what has a newer successor, then the
// rest, each oldest first. It leaves alone what it cannot read just now. It goes
// on after errors and returns them joined, with what it did remove.
func (s *Store) GC(ctx context.Context, p Policy, dryRun bool) ([]Removal, error) {
	records, err := s.List(ctx)
	if err != nil {
		return nil, fmt.Errorf("gc: %w", err)
	}
	var errs []error
	records = slices.DeleteFunc(records, func(r Record) bool {
		unreadable := r.Err != nil && (!errors.Is(r.Err, checkpoint.ErrCorrupt) || errors.Is(r.Err, syscall.EIO))
		if unreadable {
			errs = append(errs, r.Err)
		}
		return unreadable
	})
	var removals []Removal
	for _, c := range s.choose(ctx, p, records) {
		if !dryRun {
			err := s.Remove(ctx, c.ID)
			if errors.Is(err, checkpoint.ErrNotFound) || errors.Is(err, checkpoint.ErrBusy) {
				continue // used or removed since
			}
			if err != nil {
				errs = append(errs, err)
				continue
			}
		}
		removals = append(removals, c)
	}
	if !dryRun {
		if err := s.sweepTrash(); err != nil {
			errs = append(errs, err)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return removals, fmt.Errorf("gc: %w", err)
	}
	return removals, nil
}

func (s *Store) sweepTrash() error {
	entries, err := s.fs.ReadDir(s.root)
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), trashPrefix) {
			err = errors.Join(err, s.fs.RemoveAll(s.path(e.Name())))
		}
	}
	return err
}

// candidate is what GC may remove; lower ranks go first.
type candidate struct {
	Removal
	rank int
	time time.Time
}

// choose applies the policy to the records.
func (s *Store) choose(ctx context.Context, p Policy, records []Record) []Removal {
	now := time.Now()
	perIdentity := map[checkpoint.Identity]int{}
	var keep []candidate
	var removals []Removal
	for _, r := range slices.Backward(records) { // newest of an identity first
		if r.State == Claimed || r.ID == "" {
			continue
		}
		c := candidate{Removal: Removal{ID: r.ID}, time: r.Time()}
		pod := ""
		if m := r.Manifest; m != nil {
			c.Identity, c.SizeBytes = m.Identity, m.Sizes.TotalBytes
			if m.Identity.Key == m.PodUID {
				pod = m.PodUID
			}
		} else {
			c.SizeBytes = s.sizeOf(ctx, r.Path)
		}
		newer := 0
		if r.State == Committed {
			newer = perIdentity[c.Identity]
			perIdentity[c.Identity]++
			c.rank = 1
			if newer == 0 {
				c.rank = 2
			}
		}
		switch {
		case p.TTL > 0 && now.Sub(c.time) > p.TTL:
			c.Reason = fmt.Sprintf("older than %s", p.TTL)
		case pod != "" && p.DeadPodUIDs != nil && p.DeadPodUIDs(pod):
			c.Reason = "its pod is gone"
		case p.KeepPerIdentity > 0 && newer >= p.KeepPerIdentity:
			c.Reason = fmt.Sprintf("more than %d of this identity", p.KeepPerIdentity)
		default:
			keep = append(keep, c)
			continue
		}
		removals = append(removals, c.Removal)
	}
	slices.SortStableFunc(keep, func(a, b candidate) int {
		return cmp.Or(cmp.Compare(a.rank, b.rank), a.time.Compare(b.time), cmp.Compare(a.ID, b.ID))
	})
	count, bytes := len(keep), int64(0)
	for _, c := range keep {
		bytes += c.SizeBytes
	}
	for _, c := range keep {
		switch {
		case p.MaxCount > 0 && count > p.MaxCount:
			c.Reason = fmt.Sprintf("more than %d in the store", p.MaxCount)
		case p.MaxBytes > 0 && bytes > p.MaxBytes:
			c.Reason = fmt.Sprintf("more than %d bytes in the store", p.MaxBytes)
		default:
			return removals
		}
		count--
		bytes -= c.SizeBytes
		removals = append(removals, c.Removal)
	}
	return removals
}

// sizeOf is the size of all files in a checkpoint that cannot say it itself; 0
// if it cannot be read.
func (s *Store) sizeOf(ctx context.Context, dir string) int64 {
	t, err := s.walk(ctx, dir)
	if err != nil {
		return 0
	}
	var size int64
	for _, name := range t.files {
		if st, err := s.fs.Lstat(filepath.Join(dir, name)); err == nil {
			size += st.Size()
		}
	}
	return size
}
